"""Image files as cameras, phones and editors write them -> upright images, 8 bits per channel, in sRGB."""

import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError, features

from ldm import adobe_rgb
from ldm.colour import to_srgb
from ldm.errors import UserError
from ldm.library_warnings import warnings_of
from ldm.shipped import find

_PHONES = (".heic", ".heif", ".hif", ".avif")
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", *_PHONES)
_RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw")
UNSUPPORTED = (".jxl", ".jp2", ".tga", ".ppm", ".pgm", ".exr", ".hdr", ".svg", ".eps", ".psd", *_RAW)
"""Images too, but of formats that are not read here."""

LARGEST = 2**26
"""Pixels above which an image is halved until it has fewer."""

_REFUSED = 2**30  # pixels above which a file is taken for an attack on the memory
_TEXT = 2**29  # bytes of text that a file may carry beside its image
_NARROW = 4095  # the largest value of 12 bits
_UNREADABLE = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)
"""What damaged files make of their readers."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""

_HARMLESS = re.compile(
    "decompression bomb|transparency expressed in bytes|malformed MPO|invalid APNG|too many entries", re.IGNORECASE
)
"""Warnings of Pillow's on what is read right, or not read at all."""

_lock = threading.RLock()


@dataclass(frozen=True)
class Decoded:
    """An image as its file has it, but upright and not larger than `LARGEST`."""

    file: Path
    image: Image.Image  # of any of Pillow's modes
    profile: bytes | None  # its colour profile (ICC)
    deep: bool  # 16 bits per channel in the file, whatever the mode keeps of them


T = TypeVar("T")


def read_file(file: str | Path, convert: Callable[[Decoded], T]) -> T:
    """Read an image file and convert what it holds.

    Of an animation the first frame is taken. What is larger than `LARGEST` is halved, as often as needed.

    Raises:
        UserError: the file is not an image, a broken one, or of a format that is not read; it is named.
    """
    file = find(file)
    if file.suffix.lower() in UNSUPPORTED:
        raise UserError(f"{file} is not of a supported format ({', '.join(EXTENSIONS)}): convert it or take it out")
    try:
        with _open(file) as image:
            decoded = _decode(image, file)
        return convert(decoded)
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise UserError(
            f"{file} is not a readable image ({_reason(error)}): mend it or take it out of the folder"
        ) from error


def in_srgb(decoded: Decoded) -> Image.Image:
    """Return an image with 8 bits per channel in sRGB: RGB, RGBA, L or LA.

    Raises:
        UserError: it has values that cannot be what they seem.
    """
    image = to_srgb(_plain(_eight_bits(decoded)), decoded.profile, decoded.file)
    if decoded.deep and _brightest(image) <= round(_NARROW / 257):
        raise UserError(
            f"{decoded.file} is nearly black: it has 16 bits per channel, but no value above {_NARROW}, as if 12 bits or "
            "fewer lay in them: stretch its values to the whole range, or take it out"
        )
    return image


def orientation(image: Image.Image) -> int:
    """Return an image's EXIF orientation, 1 to 8; 1 where it has none, or one that cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return value if value in _TURNS else 1
    except _UNREADABLE:
        return 1


def orientation_of(file: str | Path) -> int:
    """Return the EXIF orientation of an image file that can be read."""
    with _open(find(file)) as image:
        return orientation(image)


def size_of(file: str | Path) -> tuple[int, int]:
    """Return the width and height that an image file claims, without decoding it."""
    with _open(find(file)) as image:
        return image.size


def turn(image: Image.Image, marked: int) -> Image.Image:
    """Turn an image as its EXIF orientation says."""
    return image.transpose(_TURNS[marked]) if marked in _TURNS else image


@contextmanager
def _open(file: Path) -> Iterator[Image.Image]:
    """Open an image, however large it and its texts are, short of an attack."""
    with open(file, "rb") as stream:
        head = stream.read(12)
    turned: list[bool] = []
    with _lock, warnings_of(file, lambda warning: _explain(warning, any(turned))):
        before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = _REFUSED // 2, _TEXT, _TEXT
        try:
            if head[4:8] == b"ftyp":
                _know_phones(file, head[8:])
            with Image.open(file) as image:
                yield image
                turned.append(orientation(image) > 1)
        finally:
            Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = before


def _explain(warning: str, turned: bool) -> str | None:
    """Return what a warning of Pillow's means for the user; None for sizes, tags and frames that are not used here."""
    if re.search("exif|truncated file read", warning, re.IGNORECASE):
        damaged = f"its EXIF block is damaged ({warning.strip()})"
        return None if turned else f"{damaged}: should the image lie on its side, turn it and save it anew"
    return None if _HARMLESS.search(warning) else warning


def _know_phones(file: Path, brand: bytes) -> None:
    """Let Pillow read HEIC; the format is taken from the content, for phones also call such files .jpg."""
    if brand in (b"avif", b"avis"):
        if not features.check("avif"):
            raise UserError(f"{file} is AVIF, which this Pillow cannot read: pip install -U pillow, or convert the file")
        return
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise UserError(f"{file} is HEIC, which needs the package pillow-heif: pip install pillow-heif") from error
    register_heif_opener()


def _decode(image: Image.Image, file: Path) -> Decoded:
    image.seek(0)
    factor = 1
    while image.width * image.height > LARGEST * factor**2:
        factor *= 2
    if factor > 1 and image.format in ("JPEG", "MPO"):
        image.draft(None, (image.width // factor, image.height // factor))  # decoded small, in a fraction of the memory
    deep = ";16" in image.mode or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    image.load()
    profile, marked = image.info.get("icc_profile"), orientation(image)
    if profile is None and image.mode in ("RGB", "RGBA") and _is_adobe_rgb(image):
        profile = adobe_rgb.profile()
    small = image
    while small.width * small.height > LARGEST:
        small = (_plain(small) if small.mode in _UNSHRINKABLE else small).reduce(2)
    return Decoded(file, turn(small, marked), profile, deep)


def _is_adobe_rgb(image: Image.Image) -> bool:
    """Whether the EXIF block names Adobe RGB: by its number, or as "not sRGB" of the kind R03 (DCF 2.0)."""
    try:
        exif = image.getexif()
        inner = exif.get_ifd(ExifTags.IFD.Exif)
        space = inner.get(ExifTags.Base.ColorSpace)
        has_kind = ExifTags.IFD.Interop in inner
        kind = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) if has_kind else None
        return space == 2 or (space in (0xFFFF, None) and str(kind).strip("\0 ") == "R03")
    except _UNREADABLE:
        return False


_UNSHRINKABLE = ("1", "P", "PA", "La", "RGBa")


def _plain(image: Image.Image) -> Image.Image:
    """Palettes, single bits and premultiplied colours as L, LA, RGB or RGBA; other modes as they are."""
    if image.mode == "La":
        return image.convert("LA")
    if image.has_transparency_data:
        return image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    return image.convert("L" if image.mode == "1" else "RGB") if image.mode in ("1", "P", "RGBX") else image


def _brightest(image: Image.Image) -> int:
    return int(np.asarray(image.convert("RGB")).max())


def _eight_bits(decoded: Decoded) -> Image.Image:
    """Scale 16-bit and floating-point grey to 8 bits, where convert() would cut off what is above 255."""
    image = decoded.image
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    most = values.max(initial=0)
    if image.mode == "F":
        values = values * 255 if most <= 1 else values
    elif most > 255 or ";16" in image.mode:
        values = values / 257
    if not np.isfinite(values).all() or values.max(initial=0) > 255.5 or values.min(initial=0) < -1:
        raise UserError(f"{decoded.file} has values that no image of 8 or 16 bits has: convert it to one, or take it out")
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"
    return next(iter(str(error).splitlines()), "") or type(error).__name__
