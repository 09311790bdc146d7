"""Images, masks, captions and augmentation as fine-tuning reads them."""

import json
import multiprocessing
import time

import numpy as np
import pytest
import torch
from helpers import POSIX
from PIL import Image

from dci.captions import captioned_files
from dci.finetuning.augmentation import LARGE_WORDS, SMALL_WORDS, Placement
from dci.finetuning.config import DataConfig, GenerateConfig
from dci.finetuning.dataset import BatchSlot, ConceptDataset
from dci.finetuning.images import captions_of, read_references, read_regularization
from dci.finetuning.masks import latent_weights, masked_mse
from dci.finetuning.regularization import generate
from ldm.errors import UserError
from ldm.images import list_images, open_image, read_image


def references(folder, size=64, **options):
    said = []
    return read_references(folder, DataConfig(str(folder), **options), size, said.append), said


def half(size, mode="L"):
    """A mask whose left half is the object."""
    mask = Image.new(mode, size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_a_mask_lies_beside_its_image(tmp_path):
    for name, mask in (("a.jpg", "a.mask.png"), ("b.png", "b_mask.png")):
        Image.new("RGB", (80, 80)).save(tmp_path / name)
        half((80, 80)).save(tmp_path / mask)
    assert [f.name for f in list_images(tmp_path)] == ["a.jpg", "b.png"]
    images, said = references(tmp_path, masked_loss=True)
    assert not said
    for image in images:
        assert image.mask.shape == (1, 64, 64)
        assert image.mask[..., :30].min() == 1
        assert image.mask[..., 34:].max() == 0
    images, said = references(tmp_path)
    assert images[0].mask is None
    assert "data.masked_loss=true" in said[0]


def test_alpha_is_a_mask(tmp_path):
    image = Image.new("RGBA", (64, 64), (10, 20, 30, 0))
    image.putalpha(half((64, 64)))
    image.save(tmp_path / "a.png")
    ((read,), _) = references(tmp_path, masked_loss=True)
    assert read.mask.mean() == pytest.approx(0.5)
    assert read.pixels[:, :, 40:].min() == 1  # what is not there is white


def test_a_mask_drawn_before_the_rotation_is_turned_with_its_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 60)).save(tmp_path / "a.jpg", exif=exif)
    half((80, 60)).save(tmp_path / "a.mask.png")
    mask = references(tmp_path, masked_loss=True)[0][0].mask[0]
    # Turned by 90 degrees clockwise, what was left is above.
    assert mask[:30].min() > 0.99
    assert mask[34:].max() < 0.01


def test_an_object_in_what_is_cut_off_is_named(tmp_path):
    Image.new("RGB", (120, 40)).save(tmp_path / "a.png")
    mask = Image.new("L", (120, 40), 0)
    mask.paste(255, (0, 0, 20, 40))
    mask.save(tmp_path / "a.mask.png")
    with pytest.raises(UserError, match="object of .*a.png lies outside the middle part"):
        references(tmp_path, masked_loss=True)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (None, "no mask for"),
        (Image.new("L", (30, 30), 255), "30 x 30 px, its image a.png 40 x 40"),
        (Image.new("L", (40, 40), 0), "is empty"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(tmp_path, mask, reason):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    if mask:
        mask.save(tmp_path / "a.mask.png")
    with pytest.raises(UserError, match=reason):
        references(tmp_path, masked_loss=True)


def test_weights_of_the_latent_are_shares_of_its_cells():
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :6] = 1
    assert latent_weights(mask, 4, 0.0).tolist() == [[[1, 0.5], [1, 0.5]]]
    assert latent_weights(mask, 4, 0.2).tolist()[0][0] == pytest.approx([1, 0.6])


def test_the_masked_loss_sees_what_the_mask_shows_and_counts_rows_alike():
    output, target = torch.randn(2, 3, 4, 5, 5).unbind()
    weights = torch.zeros(3, 1, 5, 5)
    weights[0, :, :2], weights[1, :, 2], weights[2] = 1, 1, 0.5
    errors = [(output - target)[0, :, :2], (output - target)[1, :, 2], (output - target)[2]]
    expected = sum(error.square().mean() for error in errors) / 3
    torch.testing.assert_close(masked_mse(output, target, weights), expected)
    torch.testing.assert_close(masked_mse(output, target, torch.ones(3, 1, 5, 5)), masked_mse(output, target, None))
    changed = output.clone()
    changed[0, :, 2:] += 9
    assert torch.equal(masked_mse(changed, target, weights), masked_mse(output, target, weights))


def test_masks_are_mirrored_with_their_images(tiny, tmp_path):
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 32, 64))
    image.save(tmp_path / "a.png")
    half((64, 64)).save(tmp_path / "a.mask.png")
    (images, _) = references(tmp_path, masked_loss=True)
    dataset = ConceptDataset(tiny, images, [], DataConfig("x", masked_loss=True, cache_latents=False))
    (batch,) = dataset.__getitems__([[BatchSlot(0, 0, i) for i in range(20)]])
    rows = zip(batch.pixels, batch.weights, strict=True)
    lefts = {(pixels[0, 0, 0].item(), weights[0, 0, 0].item(), weights[0, 0, -1].item()) for pixels, weights in rows}
    assert lefts == {(1, 1, 0), (-1, 0, 1)}


def test_more_than_eight_bits_are_rounded_not_cut_off(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, 0)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        read = np.asarray(read_image(tmp_path / name)).astype(int)
        assert np.abs(read[0, :, 0] - np.round(ramp[0] / 257)).max() <= 1
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "b.tif")
    assert np.abs(np.asarray(read_image(tmp_path / "b.tif")).astype(int)[0, :, 0] - np.round(ramp[0] / 257)).max() <= 1


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_the_first_frame_of_an_animation_is_taken(tmp_path, name):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert np.asarray(open_image(tmp_path / name))[3, 3].tolist()[:3] == [255, 0, 0]


def test_bad_images_are_named_and_left_out_on_request(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff half")
    (tmp_path / "phone.HEIC").write_bytes(b"ftypheic")
    with pytest.raises(UserError, match="broken.jpg is not a readable image"):
        references(tmp_path)
    images, said = references(tmp_path, on_bad_image="skip")
    assert [p.file.name for p in images] == ["good.png"]
    assert len(said) == 2
    assert "broken.jpg" in said[0]
    assert "phone.HEIC is not a readable image" in said[1]
    (tmp_path / "good.png").unlink()
    with pytest.raises(UserError, match="no usable images"):
        references(tmp_path, on_bad_image="skip")


def test_captions_come_from_lists_or_from_beside(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (10, 10), (i, 0, 0)).save(tmp_path / f"images/{i}.png")
    names = ["images/2.png", "/elsewhere/reg/images/0.png", "./regularization/dog/images/1.png"]
    (tmp_path / "images.txt").write_text("\n".join(names))
    (tmp_path / "caption.txt").write_text("dog two\ndog zero\ndog one\n")
    captions = {file.name: caption for file, caption in captioned_files(tmp_path).items()}
    assert captions == {"2.png": "dog two", "0.png": "dog zero", "1.png": "dog one"}
    read = read_regularization(tmp_path, DataConfig(), 16)
    assert [p.caption for p in read] == ["dog two", "dog zero", "dog one"]
    assert [round((p.pixels[0, 0, 0].item() + 1) * 127.5) for p in read] == [2, 0, 1]
    (tmp_path / "caption.txt").write_text("dog two\n")
    with pytest.raises(UserError, match="3 lines, caption.txt has 1"):
        captioned_files(tmp_path)
    for i in range(3):
        (tmp_path / f"images/{i}.txt").write_text(f"a  dog\n{i} ")
    assert list(captioned_files(tmp_path / "images").values()) == ["a dog 0", "a dog 1", "a dog 2"]


def test_random_resize_follows_the_published_odds():
    """Sizes, words and places of Custom Diffusion's augmentation (its Sec. 3.2 and training code)."""
    random, size = np.random.default_rng(0), 512
    placements = [Placement.sample(random, size) for _ in range(4000)]
    small = [p for p in placements if p.side <= size]
    assert len(small) / len(placements) == pytest.approx(0.66, abs=0.03)
    assert 171 <= min(p.side for p in small) < 175
    assert {p.side > 614 - 1 for p in placements if p.side > size} == {True}
    assert 700 < max(p.side for p in placements) < 1.4 * size + 1
    for p in placements:
        expected = SMALL_WORDS if p.side < 0.6 * size else LARGE_WORDS if p.side > size else ("",)
        assert p.caption_prefix in expected
        assert 0 <= min(p.top, p.left) <= max(p.top, p.left) <= abs(size - p.side)
    assert {p.caption_prefix for p in placements} == {"", *SMALL_WORDS, *LARGE_WORDS}


def test_a_placed_image_lies_where_its_mask_says():
    white = torch.ones(3, 90, 90)
    placement = Placement(side=30, top=10, left=21, caption_prefix="")
    placed = placement.place(white, 64)
    assert placed.shape == (3, 64, 64)
    torch.testing.assert_close(placed[:, 10:40, 21:51], torch.ones(3, 30, 30))
    assert placed.sum() == pytest.approx(3 * 30 * 30, rel=1e-5)
    valid = placement.valid(64, 4)
    # Cells 2..9 and 5..12 are whole; the outer ones of them are left out.
    expected = torch.zeros(1, 16, 16)
    expected[:, 3:9, 6:11] = 1
    assert torch.equal(valid, expected)
    enlarged = Placement(side=80, top=5, left=16, caption_prefix="close up")
    ramp = torch.linspace(-1, 1, 80).expand(3, 80, 80)
    torch.testing.assert_close(enlarged.place(ramp, 64), ramp[:, 5:69, 16:80])
    assert enlarged.valid(64, 4).all()


def test_random_resize_in_a_batch(tiny, tmp_path):
    Image.effect_noise((200, 200), 60).convert("RGB").save(tmp_path / "a.png")
    half((200, 200)).save(tmp_path / "a.mask.png")
    (images, _) = references(tmp_path, size=90, masked_loss=True)
    dataset = ConceptDataset(tiny, images, [], DataConfig("x", augment="random-resize", masked_loss=True))
    assert "data.augment=random-resize changes them" in dataset.describe()
    (batch,) = dataset.__getitems__([[BatchSlot(0, s, 0) for s in range(60)]])
    assert batch.pixels.shape == (60, 3, 64, 64)
    assert batch.weights.shape == (60, 1, 16, 16)
    # The object is half of the valid region, mirrored or not, except where an enlarged half is cut off.
    small = [i for i, words in enumerate(batch.caption_prefix) if words in SMALL_WORDS]
    assert len(small) > 5
    for i in small:
        outside = batch.pixels[i].abs().sum(dim=0) == 0
        assert outside.float().mean() > 0.5
        assert 0 < batch.weights[i].sum() < 0.5 * 16 * 16 * 0.36


@pytest.mark.slow
def test_regularization_images_are_made_once_and_the_missing_ones_again(tiny_base, tmp_path, capfd):
    config = GenerateConfig(number=5, prompts=["photo of a {}", "a {} in the snow"], steps=2, batch_size=2)
    folder = generate(tiny_base, config, "dog", tmp_path)
    assert "regularization images" in capfd.readouterr().err
    assert list(captions_of(folder).values()) == ["photo of a dog", "a dog in the snow"] * 2 + ["photo of a dog"]
    record = json.loads((folder / "prompts.json").read_text())
    assert record["00003"]["steps"] == 2 and record["00003"]["index"] == 3
    first = {f.name: f.read_bytes() for f in (folder / "samples").glob("*.png")}
    assert len(set(first.values())) == 5
    (folder / "samples/00001.png").unlink()
    half_written = folder / "samples/00004.png"
    half_written.write_bytes(half_written.read_bytes()[:-20])
    # A larger number adds to what is there; the batch size does not matter.
    config.number, config.batch_size = 6, 3
    assert generate(tiny_base, config, "dog", tmp_path) == folder
    assert len(list((folder / "samples").glob("*.png"))) == 6
    for name, content in first.items():
        difference = np.asarray(Image.open(folder / "samples" / name)).astype(int)
        (tmp_path / "before.png").write_bytes(content)
        assert np.abs(difference - np.asarray(Image.open(tmp_path / "before.png"))).max() <= 1
    capfd.readouterr()
    generate(tiny_base, config, "dog", tmp_path)
    assert "regularization images" not in capfd.readouterr().err
    read = read_regularization(folder, DataConfig(), 64, most=4)
    assert len(read) == 4 and read[1].caption == "a dog in the snow"
    assert generate(tiny_base, config, "cat", tmp_path) != folder


@POSIX
def test_processes_share_regularization_images_and_take_over_from_a_killed_one(tiny_base, tmp_path, monkeypatch):
    """They hold the locks of sampling: what another process is making is waited for, what it leaves behind is made."""
    from dci.samples.file_locks import FileLocks

    config = GenerateConfig(number=3, steps=1, batch_size=1)
    folder = generate(tiny_base, config, "dog", tmp_path)
    whole = {f.name: f.read_bytes() for f in (folder / "samples").glob("*.png")}
    (folder / "samples/00001.png").unlink()
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def hold():
        assert FileLocks(folder / ".locks").acquire(range(1, 2))
        ready.set()
        time.sleep(60)

    other = context.Process(target=hold)
    other.start()
    ready.wait()
    waited = []

    def die(seconds):
        waited.append(seconds)
        other.kill()
        other.join()

    monkeypatch.setattr("dci.finetuning.regularization.time.sleep", die)
    generate(tiny_base, config, "dog", tmp_path)
    assert len(waited) == 1
    assert {f.name: f.read_bytes() for f in (folder / "samples").glob("*.png")} == whole


def test_what_a_folder_holds_and_is_not_used_gets_one_line(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    half((40, 40)).save(tmp_path / "a.mask.png")
    (tmp_path / "raw").mkdir()
    for name in ("a.txt", "notes.txt", "clip.mp4", ".DS_Store"):
        (tmp_path / name).touch()
    said = references(tmp_path, masked_loss=True)[1]
    assert said == [f"Not used in {tmp_path}: 1 folder (raw), 1 caption (a.txt), 2 other files (clip.mp4, notes.txt)"]
    read_regularization(tmp_path, DataConfig(), 16, said.append)
    assert said[1:] == [f"Not used in {tmp_path}: 1 folder (raw), 1 mask (a.mask.png), 2 other files (clip.mp4, notes.txt)"]


@pytest.mark.parametrize("kind", ["sampled", "lists"])
def test_what_regularization_folders_hold_besides_gets_one_line_too(tmp_path, kind):
    """Images that a record or a list names may lie in a folder of theirs, which is used then."""
    place = tmp_path / ("samples" if kind == "sampled" else "images")
    place.mkdir()
    for name in ("00000.png", "00001.png"):
        Image.new("RGB", (40, 40)).save(place / name)
    if kind == "sampled":
        (tmp_path / "prompts.json").write_text(json.dumps({"00000": "a dog", "00001": "a dog"}))
        (place / "00000.txt").touch()
        (place / "more").mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / "grid.png")
        expected = [
            f"Not used in {place}: 1 folder (more), 1 caption (00000.txt)",
            f"Not used in {tmp_path}: 1 other file (b.png)",
        ]
    else:
        (tmp_path / "images.txt").write_text("images/00000.png\nimages/00001.png\n")
        (tmp_path / "caption.txt").write_text("a dog\na dog\n")
        (tmp_path / "notes.md").touch()
        expected = [f"Not used in {tmp_path}: 2 other files (b.png, notes.md)"]
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    said = []
    assert len(read_regularization(tmp_path, DataConfig(), 16, said.append)) == 2
    assert said == expected


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_captions_of_any_encoding_and_with_odd_characters(tmp_path, recwarn, encoding, lists):
    text = "a café\x0cin the\x85snow" + ("" if encoding == "latin-1" else "\u2028")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    if lists:
        (tmp_path / "images.txt").write_text("a.png\n")
    (tmp_path / ("caption.txt" if lists else "a.txt")).write_bytes(f"{text}\r\n".encode(encoding))
    (caption,) = captions_of(tmp_path).values()
    said = [str(warning.message) for warning in recwarn if "UTF-8" in str(warning.message)]
    expected = "a caf\ufffd in the\ufffdsnow" if said else " ".join(text.split())
    assert " ".join(caption.split()) == expected
    assert len(said) == (encoding == "latin-1") and all(".txt is not UTF-8 text (byte 5)" in line for line in said)
