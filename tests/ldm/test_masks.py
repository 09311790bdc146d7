"""Masks of every form that image editors and segmenters write, against the one drawing that they all hold."""

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.images import list_images, not_used
from ldm.init_image import InitImage
from ldm.masks import as_mask, mask_of, read_mask

SIZE = (24, 16)
DRAWING = np.zeros(SIZE[::-1], bool)
DRAWING[4:9, 3:17] = True


def grey(white=255, black=0, kind=np.uint8):
    return Image.fromarray(np.where(DRAWING, white, black).astype(kind))


def with_alpha(colours, alpha):
    image = colours.copy()
    image.putalpha(alpha if isinstance(alpha, Image.Image) else Image.new("L", SIZE, alpha))
    return image


def palette(colours, **options):
    """Indices 0 and 1; `options` go to the file."""
    image = Image.fromarray(DRAWING.astype(np.uint8)).convert("P")
    image.putpalette([value for colour in colours for value in colour])
    image.info |= options
    return image


WHITE, BLACK = Image.new("RGB", SIZE, "white"), Image.new("RGB", SIZE, "black")
FORMS = {
    "grey": grey(),
    "1-bit": grey().convert("1"),
    "RGB": grey().convert("RGB"),
    "RGBA, opaque": with_alpha(grey().convert("RGB"), 255),
    "RGBA, one alpha": with_alpha(grey().convert("RGB"), 128),
    "RGBA, nearly opaque": with_alpha(grey().convert("RGB"), Image.fromarray(np.where(DRAWING, 250, 255).astype(np.uint8))),
    "LA, opaque": with_alpha(grey(), 255),
    "white strokes on a transparent ground": with_alpha(WHITE, grey()),
    "white strokes on a transparent black ground": with_alpha(grey().convert("RGB"), grey()),
    "black strokes on a transparent ground": with_alpha(BLACK, grey()),
    "red strokes on a transparent ground": with_alpha(Image.new("RGB", SIZE, "red"), grey()),
    "grey strokes on a transparent ground": with_alpha(Image.new("L", SIZE, 90), grey()),
    "white on black, and a transparent rest": with_alpha(
        grey().convert("RGB"), Image.fromarray(np.where(np.arange(24) < 20, 255, 0).astype(np.uint8)[None].repeat(16, 0))
    ),
    "palette": palette([(0, 0, 0), (255, 255, 255)]),
    "palette of dark colours": palette([(0, 0, 0), (128, 0, 0)]),
    "palette with a transparent ground": palette([(255, 255, 255), (255, 255, 255)], transparency=0),
    "palette with a spare transparent colour": palette([(0, 0, 0), (255, 255, 255), (9, 9, 9)], transparency=2),
    "0 and 1": grey(1),
    "0 and 1, RGB": grey(1).convert("RGB"),
    "0 and 1, opaque": with_alpha(grey(1).convert("RGB"), 255),
    "0 and 128": grey(128),
    "16-bit": grey(65535, kind=np.uint16),
    "16-bit, 12 bits": grey(4095, kind=np.uint16),
    "16-bit, 0 and 1": grey(1, kind=np.uint16),
    "16-bit, 0 and 255": grey(255, kind=np.uint16),
    "red on black": Image.merge("RGB", [grey(), grey(0), grey(0)]),
    "blue on black": Image.merge("RGB", [grey(0), grey(0), grey()]),
}
IN_MEMORY = {
    "32-bit": grey(70000, kind=np.int32),
    "float": grey(1, kind=np.float32),
    "float, 255": grey(255, kind=np.float32),
    "HSV": grey().convert("RGB").convert("HSV"),
    "CMYK": grey().convert("RGB").convert("CMYK"),
    "YCbCr": grey().convert("RGB").convert("YCbCr"),
    "La": with_alpha(Image.new("L", SIZE, 255), grey()).convert("La"),
    "RGBa": with_alpha(WHITE, grey()).convert("RGBa"),
    "PA": palette([(0, 0, 0), (255, 255, 255)]).convert("PA"),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_drawing_in_every_form_of_a_file(form, tmp_path):
    FORMS[form].save(
        tmp_path / "a.png", **({"transparency": t} if (t := FORMS[form].info.get("transparency")) is not None else {})
    )
    mask = read_mask(tmp_path / "a.png", Image.new("RGB", SIZE))
    assert mask.mode == "L"
    assert np.array_equal(np.asarray(mask), np.where(DRAWING, 255, 0))


@pytest.mark.parametrize("form", {**FORMS, **IN_MEMORY})
def test_one_drawing_in_every_mode_of_pillow(form):
    assert np.array_equal(np.asarray(as_mask({**FORMS, **IN_MEMORY}[form])), np.where(DRAWING, 255, 0))


@pytest.mark.parametrize("form", ["RGBA, opaque", "0 and 1", "white strokes on a transparent ground", "16-bit", "1-bit"])
def test_inpainting_reads_them_too(tiny, form):
    image = Image.new("RGB", (96, 64), "gray")
    canvas = InitImage.of(tiny, image, 64, 96, 1.0, FORMS[form].resize((96, 64), Image.Resampling.NEAREST))
    assert canvas.mask.mean().item() == pytest.approx(DRAWING.mean(), abs=0.02)


def test_soft_edges_stay_soft():
    ramp = Image.fromarray(np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(4, 0))
    assert np.array_equal(np.asarray(as_mask(ramp)), np.asarray(ramp))
    strokes = Image.merge("LA", [Image.new("L", ramp.size, 255), ramp])
    assert np.array_equal(np.asarray(as_mask(strokes)), np.asarray(ramp))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (grey(0), "is empty"),
        (grey(255, 255), "255 throughout"),
        (grey(1, 1), "1 throughout"),
        (grey(0, kind=np.uint16), "is empty"),
        (grey(65535, 65535, np.uint16), "65535 throughout"),
        (with_alpha(BLACK, 255), "is empty"),
        (with_alpha(grey().convert("RGB"), 0), "is empty"),
        (grey(255, 200), "values go from 200 to 255"),
        (Image.fromarray(np.digitize(np.arange(384).reshape(16, 24), (100, 200)).astype(np.uint8)), "3 labels"),
        (grey(np.nan, kind=np.float32), "no numbers"),
        (grey(-3, kind=np.float32), "negative"),
    ],
)
def test_what_cannot_be_a_mask_is_said(image, words):
    with pytest.raises(UserError, match=words):
        as_mask(image)


def test_a_mask_of_another_size_is_said(tmp_path):
    grey().save(tmp_path / "m.png")
    with pytest.raises(UserError, match="m.png is 24 x 16 px, its image 16 x 25"):
        read_mask(tmp_path / "m.png", Image.new("RGB", (16, 25)))


NAMES = [
    "dog.mask.png",
    "dog_mask.png",
    "dog-mask.png",
    "dog-masklabel.png",
    "mask_dog.png",
    "mask-dog.png",
    "Dog_Mask.PNG",
    "DOG-MASKLABEL.PNG",
    "Mask_Dog.png",
    "dog_mask.jpg",
    "dog.mask.webp",
    "dog.jpg.mask.png",
    "dog mask.png",
    "dog.MASK.tif",
]


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_known_by_their_names(name, tmp_path):
    for file in ("dog.jpg", "a cat.png", name):
        Image.new("RGB", (8, 8)).save(tmp_path / file)
    assert [file.name for file in list_images(tmp_path)] == ["a cat.png", "dog.jpg"]
    assert mask_of(tmp_path / "dog.jpg") == tmp_path / name
    assert mask_of(tmp_path / "a cat.png") is None


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_without_its_image_is_not_trained_as_one(name, tmp_path):
    for file in ("cat.jpg", name):
        Image.new("RGB", (8, 8)).save(tmp_path / file)
    images = list_images(tmp_path)
    assert [file.name for file in images] == ["cat.jpg"]
    assert not_used(tmp_path, images) == f"1 mask ({name})"


def test_images_of_masks_to_wear_are_images(tmp_path):
    for file in ("mask_01.jpg", "mask_02.jpg", "unmasked.png", "maskot.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / file)
    assert [file.name for file in list_images(tmp_path)] == ["maskot.png", "unmasked.png"]
    for file in ("unmasked.png", "maskot.png"):
        (tmp_path / file).unlink()
    assert [file.name for file in list_images(tmp_path)] == ["mask_01.jpg", "mask_02.jpg"]


def test_two_masks_of_one_image_are_named(tmp_path):
    for file in ("dog.jpg", "dog_mask.png", "dog-masklabel.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / file)
    with pytest.raises(UserError, match="dog.jpg has several masks, dog-masklabel.png and dog_mask.png"):
        mask_of(tmp_path / "dog.jpg")
