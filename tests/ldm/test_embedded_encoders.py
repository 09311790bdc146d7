"""The embedded encoders: loading without a network, their training, and the figures made with them."""

import dataclasses
import json
import runpy

import numpy as np
import open_clip
import pytest
import torch
from helpers import ROOT, run_main
from open_clip.loss import ClipLoss
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import binomtest

from ldm.embedded_encoders import ENCODERS, UNKNOWN, load_classifier, load_clip, load_instance_encoder
from ldm.errors import UserError
from ldm.pretraining import encoders, evaluation
from ldm.pretraining.accuracy import classifier_accuracy, clip_accuracy, instance_accuracy
from ldm.pretraining.artwork import HELD_OUT, NOUNS
from ldm.pretraining.cache import RenderedWorld
from ldm.pretraining.config import PretrainConfig
from ldm.pretraining.evaluation import LabelledPrompt, classify, generate_images, held_out_images, labelled_prompts
from ldm.pretraining.instances import FigureDataset, artworks, repaint
from ldm.pretraining.loop import fit
from ldm.pretraining.run_encoders import LabelledDataset, save_encoder
from ldm.pretraining.scenes import PLACES
from ldm.pretraining.vae import psnr
from ldm.text_to_image import SamplingOptions, text_to_image

OPTIONS = PretrainConfig(
    steps=3, batch_size=4, warmup=2, precision="32-true", accelerator="cpu", checkpoint_every=3, learning_rate=1e-3
)


@pytest.fixture(scope="module")
def clip():
    return load_clip()


def test_the_encoders_are_at_most_20_mb_and_state_their_accuracy():
    assert sum(file.stat().st_size for file in ENCODERS.iterdir()) <= 20e6
    stated = json.loads((ENCODERS / "accuracy.json").read_text())
    assert stated.keys() == {"clip", "classifier", "instance"}
    assert all(0.5 < stated["classifier"][key] <= 1 for key in ("noun", "place"))


@pytest.mark.parametrize("load", [load_clip, load_instance_encoder])
def test_features_are_unit_vectors_of_any_image_size(load):
    encoder = load()
    for size in (64, 100):
        features = encoder.image_features(torch.rand(3, 3, size, size) * 2 - 1)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))


def test_clip_is_a_model_that_open_clip_builds(clip):
    """open_clip itself, given the configuration and the weights, computes the same features."""
    open_clip.add_model_config(ENCODERS / "clip.json")
    theirs = open_clip.create_model("clip", pretrained=str(ENCODERS / "clip.safetensors")).eval()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    prompts = ["a dog on the beach", "a red car"]
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_image(images, normalize=True), clip.image_features(images))
        text = theirs.encode_text(clip.tokenize(prompts), normalize=True)
    torch.testing.assert_close(text, clip.text_features(prompts))


def test_clip_knows_the_demo_prompts(clip):
    """Rows of compact ids: the end token is the highest, which is where open_clip reads the features."""
    ids = clip.tokenize(["a cat on the beach", "a cat in the snow", "a zeppelin", "a dog " * 60])
    assert ids.shape == (4, clip.clip.context_length)
    assert (ids.max(dim=1).values == len(clip.vocabulary) + 1).all()
    assert ids[0].argmax() == 6 and ids[3].argmax() == ids.shape[1] - 1
    assert not (ids[:2] == UNKNOWN).any() and (ids[2] == UNKNOWN).any()


def test_demo_reference_images_are_named(clip):
    """The demo concepts were never seen, but a car is a car."""
    from ldm.images import read_image, to_tensor

    classifier = load_classifier()
    for noun, place in (("car", "snow"), ("teapot", "grass")):
        files = sorted((ROOT / "data/concepts" / noun).glob("*.png"))
        images = torch.stack([to_tensor(read_image(file)) for file in files])
        nouns, places = classifier.logits(images)
        assert [classifier.places[i] for i in places.argmax(-1)].count(place) >= 4


def test_missing_and_broken_encoders(tmp_path):
    with pytest.raises(UserError, match="clip.json"):
        load_clip(tmp_path)
    for name in ("instance.json", "instance.safetensors"):
        (tmp_path / name).write_bytes((ENCODERS / name.replace(".safetensors", ".safetensors")).read_bytes())
    (tmp_path / "instance.safetensors").write_bytes((ENCODERS / "classifier.safetensors").read_bytes())
    with pytest.raises(UserError, match="does not fit instance.json"):
        load_instance_encoder(tmp_path)


def test_contrastive_loss():
    """open_clip's own loss; and pairs that fit as well are not counted as wrong."""
    a, b = torch.nn.functional.normalize(torch.randn(2, 6, 8), dim=-1)
    scale = torch.tensor(7.0)
    torch.testing.assert_close(encoders.contrastive_loss(a, b, scale), ClipLoss()(a, b, scale))
    same = torch.eye(6, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    assert encoders.contrastive_loss(a, b, scale, same) < encoders.contrastive_loss(a, b, scale)


def test_rows_without_a_label_count_for_nothing():
    logits, labels = torch.randn(5, 4), torch.tensor([1, encoders.IGNORED, 3, encoders.IGNORED, 0])
    expected = -logits.log_softmax(-1)[[0, 2, 4], [1, 3, 0]].mean()
    torch.testing.assert_close(encoders.labelled_loss(logits, labels), expected)
    assert encoders.labelled_loss(logits, torch.full((5,), encoders.IGNORED)) == 0


def test_an_image_learns_its_noun_and_place_among_prompts():
    """An image whose feature is the text's own: the probability of its noun is the softmax over the nouns' cosines."""
    torch.manual_seed(0)
    prompts = [["a dog on the beach", "a dog in the snow"], ["a cat on the beach", "a cat in the snow"]]
    network = encoders.new_clip(sum(prompts, [])).eval()
    classes = torch.stack([network.tokenize(row) for row in prompts])
    scale = torch.tensor(5.0)
    beach = encoders.CLIPTraining(network, OPTIONS, classes[:, :1])
    dog, cat = network.text_features(["a dog on the beach", "a cat on the beach"])
    noun, place = beach.class_losses(dog[None], scale, torch.tensor([0]), torch.tensor([0]))
    torch.testing.assert_close(noun, torch.log1p(torch.exp(scale * (dog @ cat - 1))))
    assert place == 0  # there is one place only
    dogs = encoders.CLIPTraining(network, OPTIONS, classes[:1])
    snow = network.text_features(["a dog in the snow"])[0]
    noun, place = dogs.class_losses(dog[None], scale, torch.tensor([0]), torch.tensor([1]))
    torch.testing.assert_close(place, torch.log1p(torch.exp(scale * (1 - dog @ snow))))
    assert noun == 0


def test_augmented_images_keep_their_shape_and_range():
    x = torch.zeros(5, 3, 64, 64)
    y = encoders.augmented(x)
    assert y.shape == x.shape and 0 < y.abs().max() < 1


@pytest.mark.slow
@pytest.mark.parametrize("part", ["clip", "classifier", "instance"])
def test_an_encoder_is_trained_saved_and_loaded(part, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    config = dataclasses.replace(OPTIONS, part=part)
    torch.manual_seed(0)
    if part == "clip":
        network = encoders.new_clip(["a dog", "a red cat"])
        ids = network.tokenize(["a dog", "a red cat"] * 4)
        module, load = encoders.CLIPTraining(network, config, ids[:2, None]), load_clip
        dataset = LabelledDataset(images, images[:4], ids, torch.arange(8) % 2, torch.zeros(8, dtype=torch.long))
    elif part == "classifier":
        network = encoders.new_classifier()
        noun, place = torch.tensor([0, 1, encoders.IGNORED, 2] * 2), torch.arange(8)
        module, load = encoders.ClassifierTraining(network, config), load_classifier
        dataset = LabelledDataset(images, images[:4], noun, place)
    else:
        network = encoders.new_instance_encoder()
        module, load = encoders.InstanceTraining(network, config), load_instance_encoder
        dataset = FigureDataset(_sprites(8), seed=0, scenes=18)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fit(module, dataset, tmp_path / "run")
    assert module.samples_seen == 12
    assert any(not torch.equal(before[name], value) for name, value in network.state_dict().items())
    trained = module.average.module.eval()
    save_encoder(trained, network.config, tmp_path / "encoder", part)
    loaded = load(tmp_path / "encoder")
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        of = (lambda j: torch.cat(j.logits(x), -1)) if part == "classifier" else (lambda j: j.image_features(x))
        torch.testing.assert_close(of(loaded), of(trained), atol=0.02, rtol=0.05)  # fp16 on disk


def test_labelled_images_keep_their_labels():
    """Behind the images come round trips of the first, with the labels of the first."""
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    dataset = LabelledDataset(images, images[:2] + 100, torch.arange(6))
    assert len(dataset) == 8
    rows, labels = dataset.__getitems__([5, 7, 0])
    assert rows[:, 0, 0, 0].tolist() == [5, 101, 0] and labels.tolist() == [5, 1, 0]


def _sprites(number):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (128, 90, 4), dtype=np.uint8), "RGBA") for _ in range(number)]


def test_views_are_rendered_anew_and_the_same_for_a_seed():
    """Each artwork gives its own figure and a repainted one, two different views of each; the seed decides."""
    dataset = FigureDataset(_sprites(3), seed=0, scenes=18)
    torch.manual_seed(5)
    views, later = (dataset.__getitems__([2, 0]) for _ in range(2))
    torch.manual_seed(5)
    again = dataset.__getitems__([2, 0])
    assert views.shape == (4, 2, 3, 64, 64) and views.dtype == torch.uint8
    assert torch.equal(views, again) and not torch.equal(views, later)
    assert len({view.numpy().tobytes() for view in views.flatten(0, 1)}) == 8


def test_held_out_artwork_is_never_trained_on(tmp_path):
    fluent, noto = tmp_path / "fluent/assets", tmp_path / "noto/img/google/64"
    codes = [*NOUNS.values(), *(code for _, code in HELD_OUT.values()), "1f408-200d-2b1b", "1f44b-1f3fb", "1f1e6-1f1e8"]
    for folder, suffix in ((fluent, "webp"), (noto, "png")):
        folder.mkdir(parents=True)
        for code in codes:
            (folder / f"{code}.{suffix}").touch()
    training, held_out = artworks(tmp_path)
    assert {code for _, code in HELD_OUT.values()} <= {file.stem for file in held_out}
    names = {file.name for file in training}
    assert not names & {file.name for file in held_out}
    assert f"{NOUNS['cat']}.webp" not in names | {file.name for file in held_out}  # under the demo concept
    assert "1f408-200d-2b1b.png" not in names and "1f44b-1f3fb.png" not in names and "1f1e6-1f1e8.png" not in names
    with pytest.raises(UserError, match="fetch_artwork.sh"):
        artworks(tmp_path / "elsewhere")


def test_repainting_keeps_the_outline():
    sprite = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 4), dtype=np.uint8), "RGBA")
    painted = repaint(sprite, np.random.default_rng(1))
    assert painted.getchannel("A").tobytes() == sprite.getchannel("A").tobytes()
    assert painted.tobytes() != sprite.tobytes()


class ByColour:
    """Judges whose answers follow from an image's mean colour: red picks the noun, green the place."""

    nouns, places = list(NOUNS), [*PLACES, "plain"]

    def logits(self, x):
        red, green = ((x[:, c].mean((1, 2)) + 1) * 127.5 for c in (0, 1))
        return (-(red[:, None] - torch.arange(64)).abs(), -(green[:, None] - torch.arange(17)).abs())

    def image_features(self, x):
        angle = x[:, 0].mean((1, 2)) * 2
        return torch.stack([angle.cos(), angle.sin()], dim=-1)


def _flat(red, green):
    image = np.zeros((64, 64, 3), np.uint8)
    image[..., 0], image[..., 1] = red, green
    return image


def test_accuracy_counts_right_answers():
    network = ByColour()
    world = RenderedWorld(
        np.stack([_flat(0, 0), _flat(1, 1), _flat(5, 16), _flat(7, 3)]),
        ["", "", "", ""],
        [network.nouns[0], network.nouns[2], None, network.nouns[7]],  # the second wrong, the third not asked
        [network.places[0], network.places[1], None, network.places[4]],  # the last wrong
    )
    found = classifier_accuracy(network, world)
    assert found["noun"] == pytest.approx(2 / 3) and found["place"] == pytest.approx(3 / 4)

    # Figures of distinct colours are found; those of one colour are not told apart.
    colours = np.array([[0, 40], [80, 120], [160, 200]], np.uint8)
    views = np.stack([[[_flat(c, 0)] * 3 for c in row] for row in colours])
    assert instance_accuracy(network, views)["of_all"] == 1
    views[0, 1] = views[0, 0]
    views[0, 0, 1] = _flat(230, 0)  # a stray view
    assert instance_accuracy(network, views)["of_100"] < 1


@pytest.mark.slow
def test_clip_accuracy_is_chance_for_an_unread_image(clip):
    """All images alike: one answer for all, so one noun of two is right."""
    nouns = ["dog", "cat"]
    captions = [f"a {nouns[i % 2]} number {i}" for i in range(100)]
    world = RenderedWorld(np.zeros((100, 64, 64, 3), np.uint8), captions, nouns * 50, ["beach", "snow"] * 50)
    found = clip_accuracy(clip, world, nouns)
    assert found["noun"] == 0.5 and found["place"] in (0, 0.5) and found["caption_of_100"] == pytest.approx(0.01, abs=0.02)


def test_labelled_prompts_are_different_pairs():
    labelled = labelled_prompts(200, 0)
    assert len({q.prompt for q in labelled}) == 200
    assert labelled_prompts(200, 0) == labelled != labelled_prompts(200, 1)
    assert all(q.noun in q.prompt and PLACES[q.place][1][0] in q.prompt for q in labelled)
    counts = [[q.noun for q in labelled_prompts(number, 0)].count(noun) for number in (128, 200) for noun in NOUNS]
    assert set(counts[:64]) == {2} and set(counts[64:]) == {3, 4}  # a noun's share is of as many prompts as another's
    assert len({q.prompt for q in labelled_prompts(5000, 0)}) == 1024


def test_classification_of_generated_images():
    network = ByColour()
    labelled = [
        LabelledPrompt("p", network.nouns[3], network.places[2]),
        LabelledPrompt("q", network.nouns[4], network.places[1]),
    ]
    generated = np.stack([_flat(3, 2), _flat(3, 9), _flat(9, 1), _flat(9, 9)])
    result = classify(network, labelled, torch.from_numpy(generated).permute(0, 3, 1, 2))
    assert (result["noun_right"], result["place_right"], result["both_right"]) == (0.5, 0.5, 0.25)
    assert result["noun_right_by_noun"] == {network.nouns[3]: 1, network.nouns[4]: 0}
    assert result["named"] == [network.nouns[3], network.nouns[9]]


@pytest.mark.slow
def test_images_do_not_depend_on_the_batch(tiny_base):
    options = SamplingOptions(steps=2, scale=5, seed=3, height=64, width=64)
    labelled = labelled_prompts(2, 0)
    prompts = [q.prompt for q in labelled]
    generated = [generate_images(tiny_base, prompts, 2, options, size, lambda n: None).float() for size in (4, 3)]
    assert (generated[0] - generated[1]).abs().max() <= 1
    alone = text_to_image(tiny_base, prompts[1], [2, 3], options).clamp(-1, 1)
    assert (generated[0][2:] - (alone + 1) * 127.5).abs().max() <= 1.01


def test_batches_that_were_kept_are_taken_and_others_made_again(monkeypatch, tmp_path):
    made = []

    def drawn(model, prompts, rows, options):
        made.append(rows)
        return torch.full((len(rows), 3, 8, 8), len(made) / 10)

    monkeypatch.setattr(evaluation, "text_to_image", drawn)
    sample = lambda: generate_images(None, ["a", "b"], 2, None, 2, lambda n: None, tmp_path)  # noqa: E731
    first = sample()
    assert made == [[0, 1], [2, 3]] and torch.equal(sample(), first) and len(made) == 2
    one, other = sorted(tmp_path.iterdir())
    one.write_bytes(one.read_bytes()[:20])
    save_file({"pictures": first[2:]}, other)  # as an earlier version called them
    assert sample().shape == first.shape and made[2:] == [[0, 1], [2, 3]]
    save_file({"images": first[:1]}, one)
    assert torch.equal(sample()[2:], torch.full((2, 3, 8, 8), 178, dtype=torch.uint8)) and len(made) == 5


@pytest.mark.slow
def test_psnr_of_a_known_error_and_of_the_held_out_images(tiny_base):
    class Shifted:
        """Gives images back a little too bright."""

        class Posterior:
            def __init__(self, mean):
                self.mean = mean

        def encode(self, x):
            return self.Posterior(x)

        def decode(self, z):
            return z + 0.02

    images = np.full((3, 64, 64, 3), 100, np.uint8)
    assert psnr(Shifted(), images).tolist() == pytest.approx([20 * np.log10(2 / 0.02)] * 3, abs=1e-3)
    held_out = held_out_images()
    assert held_out.shape == (256, 64, 64, 3)
    assert len({image.tobytes() for image in held_out}) == 256
    assert psnr(tiny_base.autoencoder, held_out[:64]).mean() > 25


@pytest.mark.parametrize(("right", "number"), [(256, 256), (240, 256), (1, 7), (0, 5)])
def test_shares_have_wilsons_interval(right, number, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    found = runpy.run_path(str(ROOT / "scripts/evaluate_base.py"))["wilson"](right / number, number)
    expected = binomtest(right, number).proportion_ci(method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_page_of_the_base_model_is_that_of_its_figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    program = runpy.run_path(str(ROOT / "scripts/evaluate_base.py"))
    result = json.loads((ROOT / "docs/base-evaluation.json").read_text())
    page = (ROOT / "docs/base-evaluation.md").read_text(encoding="utf-8")
    assert program["report"](result, len(result["prompts"])) == page
    shares = result["noun_right_by_noun"].values()
    assert 100 * np.mean(list(shares)) == pytest.approx(100 * result["noun_right"], abs=1e-4)
    low, high = binomtest(1, 4).proportion_ci(method="wilson")
    assert (
        program["_worst_first"]({"cat": 0.25, "dog": 1.0}, 8)
        == f"cat 25% [{low:.0%}, {high:.0%}]; the other 1 100% [51%, 100%]"
    )


@pytest.mark.slow
def test_the_base_model_is_evaluated(tmp_path):
    places = ("--outdir", tmp_path, "--cache", tmp_path / "cache")
    options = ("--prompts", 2, "--images", 2, "--steps", 2, "--device", "cpu", *places)
    run_main("evaluate_base.py", *options)
    first = (tmp_path / "base-evaluation.json").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "text_to_image", None)  # the second time nothing is generated
        run_main("evaluate_base.py", *options)
    assert (tmp_path / "base-evaluation.json").read_text() == first
    result = json.loads((tmp_path / "base-evaluation.json").read_text())
    assert result["images"] == 4
    assert 25 < result["psnr"] < 35
    assert f"{result['place_right']:.1%}" in (tmp_path / "base-evaluation.md").read_text()
    assert Image.open(tmp_path / "base-evaluation.png").width > 128
