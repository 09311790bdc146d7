"""Image files as cameras, phones and editors write them."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from ldm import image_files
from ldm.errors import UserError
from ldm.images import open_image, read_image

# Chromaticities of red, green and blue, all with the white point D65.
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
DISPLAY_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
D65, D50 = (0.3127, 0.3290), (0.3457, 0.3585)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def xyz(x, y):
    return np.array([x / y, 1, (1 - x - y) / y])


def to_d50(primaries):
    """The matrix from linear RGB to XYZ seen under D50 (Lindbloom)."""
    columns = np.stack([xyz(*p) for p in primaries], 1)
    matrix = columns * np.linalg.solve(columns, xyz(*D65))
    scale = np.diag((BRADFORD @ xyz(*D50)) / (BRADFORD @ xyz(*D65)))
    return np.linalg.inv(BRADFORD) @ scale @ BRADFORD @ matrix


def s15(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def profile(tags, space):
    """An ICC profile of version 2."""
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78), **tags}
    header = struct.pack(">4sI4s4s4s", b"lcms", 0x02100000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp" + bytes(28)
    header += s15(*xyz(*D50)) + bytes(48)
    table, data, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, offset + len(data), len(content))
        data += content
    whole = header + table + data
    return struct.pack(">I", len(whole) + 4) + whole


def rgb_profile(primaries, gamma):
    columns = {
        name: b"XYZ \0\0\0\0" + s15(*column)
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), to_d50(primaries).T, strict=True)
    }
    white = {b"wtpt": b"XYZ \0\0\0\0" + s15(*xyz(*D50))}
    return profile(white | columns | {name: curve(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")}, b"RGB ")


def grey_profile(gamma):
    return profile({b"wtpt": b"XYZ \0\0\0\0" + s15(*xyz(*D50)), b"kTRC": curve(gamma)}, b"GRAY")


def encoded(linear):
    """sRGB's own curve (IEC 61966-2-1)."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


COLOURS = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)


@pytest.mark.parametrize("ending", ["png", "tif", "webp", "heic", "avif"])
@pytest.mark.parametrize(
    ("primaries", "gamma"), [(ADOBE, 2.2), (DISPLAY_P3, 2.2), (SRGB, 1.8)], ids=["adobe", "p3", "gamma"]
)
def test_colour_profiles_are_converted(tmp_path, ending, primaries, gamma):
    file = tmp_path / f"a.{ending}"
    flat = np.full((32, 32, 3), (180, 90, 60), np.uint8) if ending in ("heic", "avif") else COLOURS
    save(Image.fromarray(flat), file, icc_profile=rgb_profile(primaries, gamma))
    linear = (flat / 255) ** gamma @ to_d50(primaries).T @ np.linalg.inv(to_d50(SRGB)).T
    difference = np.asarray(read_image(file)) - encoded(linear)
    assert np.abs(difference).max() < (4 if ending in ("heic", "avif") else 2.1)


def save(image, file, **options):
    if file.suffix == ".heic":
        import pillow_heif

        pillow_heif.from_pillow(image).save(file, quality=100, chroma=444, **options)
    else:
        lossless = (
            {"lossless": True}
            if file.suffix == ".webp"
            else {"quality": 100, "subsampling": "4:4:4"}
            if file.suffix == ".avif"
            else {}
        )
        image.save(file, **lossless, **options)


def test_alpha_stays_and_srgb_stays_to_the_bit(tmp_path):
    image = Image.fromarray(np.dstack([COLOURS, COLOURS[..., 0]]), "RGBA")
    image.save(tmp_path / "a.png", icc_profile=rgb_profile(DISPLAY_P3, 2.2))
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png"))[..., 3], COLOURS[..., 0])
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "b.png", icc_profile=own)
    assert np.array_equal(np.asarray(open_image(tmp_path / "b.png")), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profiles_are_converted(tmp_path, mode):
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(2, 0)
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(ramp).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=grey_profile(1.8))
    assert np.abs(np.asarray(read_image(tmp_path / "a.png"))[0, :, 1] - encoded((ramp[0] / 255) ** 1.8)).max() < 2.1


def test_palettes_are_converted_in_their_colours(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 180, 90, 60])
    image.save(tmp_path / "a.png", icc_profile=rgb_profile(ADOBE, 2.2))
    Image.new("RGB", (4, 4), (180, 90, 60)).save(tmp_path / "b.png", icc_profile=rgb_profile(ADOBE, 2.2))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(read_image(tmp_path / "b.png")))


def test_lab_is_converted(tmp_path):
    Image.new("LAB", (4, 4), (138, 128, 128)).save(tmp_path / "a.tif")  # L* = 54: the middle of sRGB's greys is near
    assert np.abs(np.asarray(read_image(tmp_path / "a.tif")).astype(int) - 129).max() <= 3


@pytest.mark.parametrize("bad", ["noise", "half", "grey for colours", "colours for grey", "empty tags"])
def test_a_broken_profile_is_named_and_left_aside(tmp_path, bad):
    whole = rgb_profile(ADOBE, 2.2)
    content = {
        "noise": b"no profile" * 20,
        "half": whole[:200],
        "grey for colours": grey_profile(1.8),
        "colours for grey": whole,
        "empty tags": profile({}, b"RGB "),
    }[bad]
    image = Image.fromarray(COLOURS)
    image = image.convert("L") if bad == "colours for grey" else image
    image.save(tmp_path / "a.png", icc_profile=content)
    with pytest.warns(UserWarning, match="a.png: its colour profile cannot be used"):
        read = read_image(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF", "a.avif", "a.jpg"])
def test_what_phones_make_is_read(tmp_path, name):
    made = tmp_path / ("made.avif" if name.endswith("avif") else "made.heic")
    save(Image.new("RGB", (40, 30), (200, 100, 50)), made)
    made.rename(tmp_path / name)
    read = np.asarray(read_image(tmp_path / name)).astype(int)
    assert read.shape == (30, 40, 3)
    assert np.abs(read - (200, 100, 50)).max() <= 4


def test_a_missing_reader_is_named(tmp_path, monkeypatch):
    save(Image.new("RGB", (40, 30)), tmp_path / "a.heic")
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(UserError, match="a.heic is HEIC.*pip install pillow-heif"):
        read_image(tmp_path / "a.heic")


@pytest.mark.parametrize(
    ("space", "kind", "adobe"),
    [
        (0xFFFF, "R03", True),
        (2, None, True),
        (None, "R03", True),
        (1, "R98", False),
        (0xFFFF, None, False),
        (1, "R03", False),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_adobe_rgb_is_known_by_exif_alone(tmp_path, space, kind, adobe, mode):
    exif = Image.Exif()
    exif[0x8769] = {} if space is None else {0xA001: space}
    exif[0x8769] |= {} if kind is None else {0xA005: {1: kind, 2: b"0100"}}
    image = Image.fromarray(COLOURS).convert(mode)
    image.save(tmp_path / "a.png", exif=exif)
    linear = (np.asarray(image) / 255) ** (563 / 256)
    converted = encoded(linear @ to_d50(ADOBE).T @ np.linalg.inv(to_d50(SRGB)).T) if mode == "RGB" else None
    expected = converted if adobe and mode == "RGB" else np.asarray(image.convert("RGB"))
    assert np.abs(np.asarray(read_image(tmp_path / "a.png")) - expected).max() < (2.1 if adobe and mode == "RGB" else 0.1)


def test_a_profile_goes_before_exif(tmp_path):
    exif = Image.Exif()
    exif[0x8769] = {0xA001: 2}
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif, icc_profile=rgb_profile(DISPLAY_P3, 2.2))
    Image.fromarray(COLOURS).save(tmp_path / "b.png", icc_profile=rgb_profile(DISPLAY_P3, 2.2))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(read_image(tmp_path / "b.png")))


INKS = np.random.default_rng(1).integers(0, 256, (12, 12, 4), dtype=np.uint8)


@pytest.mark.parametrize("ending", ["tif", "jpg"])
def test_cmyk_without_a_profile_is_what_its_inks_leave_of_white(tmp_path, ending):
    inks = INKS.repeat(8, 0).repeat(8, 1)  # as large as JPEG's blocks
    Image.fromarray(inks, "CMYK").save(tmp_path / f"a.{ending}", **({"quality": 100} if ending == "jpg" else {}))
    white = 255 - inks.astype(float)
    expected = white[..., :3] * white[..., 3:] / 255
    assert np.abs(np.asarray(read_image(tmp_path / f"a.{ending}")) - expected).max() < (4 if ending == "jpg" else 1.1)


def cmyk_profile():
    """Inks that darken by a fixed lightness each and have no colour: L* = 100 - 10 c - 15 m - 20 y - 55 k."""
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(16, 4)
    lightness = 100 - corners @ [10, 15, 20, 55]
    lab = np.stack([lightness * 2.55, np.full(16, 128), np.full(16, 128)], -1).round().astype(np.uint8)
    straight = bytes(range(256))
    table = (
        b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1) + straight * 4 + lab.tobytes() + straight * 3
    )
    content = profile({b"wtpt": b"XYZ \0\0\0\0" + s15(*xyz(*D50)), b"A2B0": table, b"A2B1": table}, b"CMYK")
    return content[:12] + b"prtr" + content[16:20] + b"Lab " + content[24:]


@pytest.mark.parametrize("ending", ["tif", "jpg"])
def test_cmyk_is_converted_by_its_profile(tmp_path, ending):
    inks = INKS.repeat(8, 0).repeat(8, 1)
    options = {"quality": 100} if ending == "jpg" else {}
    Image.fromarray(inks, "CMYK").save(tmp_path / f"a.{ending}", icc_profile=cmyk_profile(), **options)
    lightness = 100 - inks / 255 @ [10, 15, 20, 55]
    luminance = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    difference = np.asarray(read_image(tmp_path / f"a.{ending}")) - encoded(luminance)[..., None]
    assert np.abs(difference).max() < 5


def exif_block(entries, marked=6, order="<"):
    """An EXIF block: its orientation, then raw entries (tag, type, count, value)."""
    entries = [(0x0112, 3, 1, struct.pack(order + "H", marked) + b"\0\0"), *entries]
    body = b"".join(struct.pack(order + "HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return b"Exif\0\0" + head + struct.pack(order + "H", len(entries)) + body + struct.pack(order + "I", 0)


ODD = {
    "text for a number": (0x0100, 2, 4, b"abc\0"),
    "number for a text": (0x010F, 3, 1, b"\x07\0\0\0"),
    "fraction by zero": (0x011A, 5, 1, b"\x08\0\0\0"),
    "beyond the end": (0x010E, 2, 9000, b"\xff\xff\0\0"),
    "unknown type": (0x0132, 99, 1, b"\0\0\0\0"),
    "float for whole": (0x0101, 11, 1, struct.pack("<f", 1.5)),
    "negative": (0x0100, 9, 1, struct.pack("<i", -5)),
    "GPS that is none": (0x8825, 2, 4, b"xyz\0"),
    "EXIF that is none": (0x8769, 3, 1, b"\xff\xff\0\0"),
    "ifd in itself": (0x8769, 4, 1, b"\x08\0\0\0"),
    "bytes for shorts": (0x0102, 7, 3, b"\1\2\3\0"),
    "a pair for one": (0x0103, 3, 2, b"\1\0\2\0"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("marked", [1, 3, 6, 8])
def test_an_odd_exif_tag_does_not_keep_an_image_from_being_turned(tmp_path, odd, marked):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif_block([ODD[odd]], marked))
    assert read_image(tmp_path / "a.jpg").size == ((20, 40) if marked > 4 else (40, 20))


@pytest.mark.parametrize(
    "block", [b"Exif\0\0", b"Exif\0\0II", b"Exif\0\0garbage" * 9, exif_block([], marked=77), exif_block([])[:-9]]
)
def test_an_exif_block_that_is_none_is_left_aside(tmp_path, block):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=block)
    assert sorted(read_image(tmp_path / "a.jpg").size) == [20, 40]


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (exif_block([ODD["beyond the end"]], marked=1), True),
        (exif_block([ODD["EXIF that is none"]], marked=1), True),
        (exif_block([])[:-9], True),
        # It is turned as it says, and nobody needs to know; nor of what cannot concern the image.
        (exif_block([ODD["EXIF that is none"]], marked=6), False),
        (exif_block([ODD["fraction by zero"]], marked=1), False),
    ],
)
def test_who_sees_a_damaged_exif_block(tmp_path, block, told):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=block)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_image(tmp_path / "a.jpg")
    said = [str(warning.message) for warning in caught]
    assert [text.partition(" (")[0] for text in said] == [f"{tmp_path / 'a.jpg'}: its EXIF block is damaged"] * told


@pytest.mark.parametrize(
    ("warning", "told"),
    [
        ("Image size (100000000 pixels) exceeds limit of 89478485 pixels, could be decompression bomb DOS attack.", False),
        ("Metadata Warning, tag 34853 had too many entries: 2, expected 1", False),
        ("Something that this version of Pillow has learned to say", True),
    ],
)
def test_what_the_library_warns_of_reaches_the_user_with_the_files_name(tmp_path, monkeypatch, warning, told):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(
        Image.Image, "load", lambda self, load=Image.Image.load: warnings.warn(warning, stacklevel=1) or load(self)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image_files.read_file(tmp_path / "a.png", lambda decoded: decoded.image)
    assert [str(w.message) for w in caught] == [f"{tmp_path / 'a.png'}: {warning}"] * told


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_an_image_with_large_texts_is_read(tmp_path, compressed):
    info = PngImagePlugin.PngInfo()
    for i in range(2):
        info.add_text(f"workflow {i}", "a" * 40_000_000, zip=compressed)
    Image.fromarray(COLOURS).save(tmp_path / "a.png", pnginfo=info)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), COLOURS)
    assert PngImagePlugin.MAX_TEXT_CHUNK == 2**20  # the library's own limit stands again


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "bmp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_a_large_image_is_read_reduced(tmp_path, monkeypatch, mode, ending):
    if (ending, mode) in {("jpg", "1"), ("jpg", "P")}:
        pytest.skip("no such JPEG")
    monkeypatch.setattr(image_files, "LARGEST", 1000)
    image = Image.new("L", (101, 63), 0)
    image.paste(255, (0, 0, 50, 63))
    image.convert(mode).save(tmp_path / f"a.{ending}")
    read = read_image(tmp_path / f"a.{ending}")
    assert read.size == (26, 16)
    assert np.asarray(read)[:, :12].min() > 240
    assert np.asarray(read)[:, 14:].max() < 15


def png_header(width, height):
    """The beginning of a PNG file, which claims a size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT"


@pytest.mark.slow
def test_200_megapixels_are_read(tmp_path):
    Image.new("L", (16320, 12240), 90).save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").size == (8160, 6120)


def test_an_attack_on_the_memory_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png_header(100_000, 100_000))
    with pytest.raises(UserError, match="a.png is not a readable image .*10000000000 pixels"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_an_image_of_which_nothing_is_seen_is_named(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (200, 100, 50, 0))
    image.convert(mode).save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    with pytest.raises(UserError, match="a.png is transparent throughout"):
        read_image(tmp_path / "a.png")


def deep_png(values):
    """A PNG file of 16-bit RGB values (h, w, 3), which Pillow reads but does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("kind", ["grey.png", "grey.tif", "colour.png"])
def test_twelve_bits_in_sixteen_are_named(tmp_path, bits, kind):
    ramp = np.linspace(0, 2**bits - 1, 64).round().astype(np.uint16)[None].repeat(8, 0)
    if kind == "colour.png":
        (tmp_path / kind).write_bytes(deep_png(np.stack([ramp] * 3, -1)))
    else:
        Image.fromarray(ramp).save(tmp_path / kind)
    if bits == 16:
        assert np.abs(np.asarray(read_image(tmp_path / kind))[0, :, 0] - ramp[0] / 257).max() <= 1
    else:
        with pytest.raises(UserError, match=f"{kind} is nearly black"):
            read_image(tmp_path / kind)


def test_eight_bits_may_be_dark(tmp_path):
    Image.new("RGB", (8, 8), (3, 9, 5)).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[0, 0].tolist() == [3, 9, 5]


@pytest.mark.parametrize("value", [np.nan, np.inf, -70, 1e6])
def test_floats_that_no_image_has_are_named(tmp_path, value):
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif has values that no image"):
        read_image(tmp_path / "a.tif")


def test_every_cut_of_a_file_is_one_line(tmp_path):
    """Whatever is left of a file, it is read or named."""
    content = io.BytesIO()
    exif = exif_block([ODD["text for a number"]])
    Image.fromarray(COLOURS).save(content, "JPEG", exif=exif, icc_profile=rgb_profile(ADOBE, 2.2))
    whole = content.getvalue()
    for length in range(0, len(whole), 41):
        (tmp_path / "a.jpg").write_bytes(whole[:length])
        with pytest.raises(UserError, match="a.jpg is not a readable image"):
            read_image(tmp_path / "a.jpg")
