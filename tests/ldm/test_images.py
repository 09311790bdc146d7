"""Images in and out."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.images import captioned_grid, grid, list_images, read_image, square, to_images, to_tensor


@pytest.fixture
def quarters():
    """Red, green / blue, white."""
    image = Image.new("RGB", (40, 20), "white")
    for x, y, colour in ((0, 0, "red"), (20, 0, "lime"), (0, 10, "blue")):
        image.paste(colour, (x, y, x + 20, y + 10))
    return image


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270), (8, Image.Transpose.ROTATE_90)],
)
def test_rotation_marks_are_obeyed(tmp_path, quarters, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    quarters.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(quarters.transpose(turn)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    read = np.asarray(read_image(tmp_path / "a.png"))
    assert read.shape == (8, 8, 3)
    if mode != "P":
        assert (read[:, 4:] == 255).all()
        assert (read[:, :4] == 0).all()


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_other_modes_become_rgb(tmp_path, mode):
    Image.new(mode, (8, 8)).save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").mode == "RGB"


def test_a_truncated_image_is_named(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:600])
    with pytest.raises(UserError, match="half.png is not a readable image"):
        read_image(tmp_path / "half.png")


def test_images_are_listed_by_name_and_others_left_out(tmp_path):
    for name in ("b.PNG", "a.jpeg", "c.webp", "Thumbs.db", ".hidden.png", "a.txt"):
        (tmp_path / name).touch()
    assert [f.name for f in list_images(tmp_path)] == ["a.jpeg", "b.PNG", "c.webp"]


def test_the_middle_square_is_used(quarters):
    cut = np.asarray(square(quarters, 20))
    assert cut.shape == (20, 20, 3)
    assert (cut[2, 2] == (255, 0, 0)).all()
    assert (cut[2, 17] == (0, 255, 0)).all()


def test_tensors_and_images_are_inverse():
    values = np.arange(3 * 256 * 4, dtype=np.uint8).reshape(32, 32, 3)
    tensor = to_tensor(Image.fromarray(values))
    assert tensor.min() == -1
    assert tensor.max() == 1
    assert np.array_equal(np.asarray(to_images(tensor[None])[0]), values)
    assert np.asarray(to_images(torch.full((1, 3, 1, 1), 7.0))[0]).max() == 255


def test_grids_hold_every_image():
    images = [Image.new("RGB", (4, 6), (i, 0, 0)) for i in range(5)]
    sheet = np.asarray(grid(images, columns=3, gap=2))
    assert sheet.shape == (14, 16, 3)
    assert [sheet[8 * (i // 3), 6 * (i % 3), 0] for i in range(5)] == [0, 1, 2, 3, 4]
    assert captioned_grid(images, ["x"] * 5, 3, 2).size == (3 * 12 - 4, 2 * (12 + 14 + 4) - 4)
