"""Training, sampling and concept files with a model of SDXL's shape and random weights."""

import dataclasses
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ENVIRONMENT, ROOT, mostly_slow, ok, refused, run, run_here, run_main
from PIL import Image
from safetensors.torch import load_file, save_file
from test_training import KEYS_VALUES, batch, config, gradients
from tiny_models import random_state

from dci.concept.concept_file import Concept, LowRank
from dci.concept.inspection import inspect_tokens
from dci.concept.low_rank import compress
from dci.concept.merging import merge
from dci.concept.prompts import parse_prompt
from dci.dual_branch.options import dual_branch, sampling_options
from dci.dual_branch.sampling import BranchContexts, SampleRequest, sample
from dci.finetuning.config import DataConfig, TrainingConfig
from dci.finetuning.dataset import REGULARIZATION, BatchSlot, ConceptDataset
from dci.finetuning.gradients import GradientSum
from dci.finetuning.images import read_references
from dci.finetuning.module import ICOTraining
from dci.finetuning.precision import cast_frozen_weights
from ldm import config as configuration
from ldm.buckets import buckets, nearest_bucket
from ldm.checkpoint import load_model
from ldm.conditioning import ImageSize
from ldm.config import AutoencoderConfig, ModelConfig
from ldm.diffusion import LatentDiffusion
from ldm.formats import presets
from ldm.solvers import SOLVERS
from ldm.text_to_image import text_to_image

YAML = ROOT / "configs/model/tiny-sdxl.yaml"
SIZES = torch.tensor([[64.0, 64, 0, 0, 32, 32]])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("xl") / "random.safetensors"
    save_file(random_state(configuration.load(ModelConfig, YAML)), file)
    return file


@pytest.fixture
def xl(weights):
    return load_model(YAML, weights)


def xl_batch(images):
    rows = batch(images)
    return dataclasses.replace(rows, sizes=SIZES.expand(len(images), -1))


@pytest.mark.parametrize("rank", mostly_slow([None, 2], 2))
def test_gradients_reach_keys_values_both_modifier_halves_and_contexts_alone(xl, rank):
    module = ICOTraining(xl, config(training=TrainingConfig(lora_rank=rank)), images=5)
    if rank:
        module.low_rank.u[0].data += 0.1  # v is reached through u, which starts at zero
    module.loss(xl_batch([1, 3, 3, REGULARIZATION])).backward()
    names = {n for n, _ in module.named_parameters() if n.endswith(KEYS_VALUES)}
    if rank:
        names = {f"low_rank.u.{i}" for i in range(len(names))} | {"low_rank.v.0"}
    expected = names | {"learned.modifiers"} | {f"learned.{part}.{i}" for part in ("prefixes", "suffixes") for i in (1, 3)}
    assert gradients(module) == expected
    for half in module.learned.modifiers.grad.split([32, 64], dim=1):
        assert (half.abs().amax(dim=1) > 0).all()


def test_gradients_reach_the_modifiers_through_the_pooled_text_too(xl):
    module = ICOTraining(xl, config(), images=1)
    module.conditioning(xl_batch([0])).vector[:, :48].square().sum().backward()
    first, second = module.learned.modifiers.grad.split([32, 64], dim=1)
    assert first.abs().max() == 0 and (second.abs().amax(dim=1) > 0).all()


@pytest.mark.slow
def test_one_step_at_full_width_and_reduced_depth():
    full = presets.sdxl()
    encoders = {name: dataclasses.replace(getattr(full, name), layers=2) for name in ("text_encoder", "text_encoder_2")}
    reduced = dataclasses.replace(
        full,
        unet=dataclasses.replace(full.unet, num_res_blocks=1, transformer_depth=[0, 1, 1]),
        autoencoder=AutoencoderConfig(ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1, force_upcast=True),
        **encoders,
    )
    module = ICOTraining(LatentDiffusion(reduced).eval(), config(), images=1)
    one = xl_batch([0])
    module.loss(one).backward()
    found = gradients(module)
    trained = {n for n, _ in module.named_parameters() if n.endswith(KEYS_VALUES)}
    assert found == trained | {"learned.modifiers", "learned.prefixes.0", "learned.suffixes.0"}
    for half in module.learned.modifiers.grad.split([768, 1280], dim=1):
        assert (half.abs().amax(dim=1) > 0).all()


@pytest.fixture(scope="module")
def learned(weights):
    """A low-rank concept, as a training leaves it."""
    module = ICOTraining(load_model(YAML, weights), config(training=TrainingConfig(lora_rank=2)), images=3)
    for factor in (*module.low_rank.u, *module.low_rank.v):
        factor.data = 0.05 * torch.randn(factor.shape)
    return module.concept()


def test_low_rank_changes_are_the_product_of_their_factors(xl):
    """Against the model with u v added to its weights."""
    module = ICOTraining(xl, config(training=TrainingConfig(lora_rank=3)), images=1)
    for factor in module.low_rank.u:
        factor.data.normal_(std=0.05)
    before = {n: p.clone() for n, p in xl.named_parameters() if n.endswith(KEYS_VALUES)}
    context = torch.randn(2, 77, 96)
    changed = module.low_rank.keys_values(xl, context)
    with module.merged():
        expected = xl.keys_values(context)
    for ours, theirs in zip(changed, expected, strict=True):
        torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=1e-4, atol=1e-4)
    for name, weight in xl.named_parameters():
        assert name not in before or torch.equal(weight, before[name])
    weights = module.concept().weights(xl)
    for name, change in module.low_rank.factors().items():
        torch.testing.assert_close(weights[name], before[name] + change.u @ change.v, rtol=1e-2, atol=1e-3)


# Programs.

QUIET = ("--device", "cpu", "validation.every=0", "logging.tensorboard=false")
STEPS = ("training.batch_size=4", "training.steps=4", "training.checkpoint_every=2", "logging.every=1")
NUMBERS = ("training.lora_rank=2", "training.precision=fp32", "training.gradient_sum=fp32")
SHORT = (*QUIET, *STEPS, *NUMBERS, "data.crop=bucket", "concept.class_noun=cat")
CONFIG = ("--config", ROOT / "configs/train/ico-sdxl.yaml")


def model_and_data(weights, images):
    return ("--model", YAML, "--checkpoint", weights, f"data.images={images}", f"data.regularization={images}")


def command_of(logdir, weights, images):
    return (*CONFIG, "--logdir", logdir, *model_and_data(weights, images), *SHORT)


def train(logdir, weights, images, *args):
    run_main("train_ico.py", *command_of(logdir, weights, images), *args)
    (folder,) = logdir.iterdir()
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Captioned images of three shapes."""
    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(60, 60), (40, 80), (90, 44)]):
        Image.effect_noise(size, 50 + 10 * number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(["a cat", "a dog", "a cat"][number])
    return folder


@pytest.fixture(scope="module")
def run_folder(weights, images, tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), weights, images)


@pytest.mark.slow
def test_a_run_goes_on_bitwise(run_folder, tmp_path):
    part = tmp_path / run_folder.name
    shutil.copytree(run_folder, part)
    for file in (part / "concept.safetensors", part / "checkpoints/step-000004.ckpt"):
        file.unlink()
    run_main("train_ico.py", "--resume", part, "--device", "cpu")
    ours, theirs = (load_file(folder / "concept.safetensors") for folder in (part, run_folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_killed_run_goes_on_bitwise(run_folder, weights, images, tmp_path):
    """Killed for good in the middle of its work, as soon as there is a checkpoint; the same command goes on."""
    program = [sys.executable, str(ROOT / "scripts/train_ico.py")]
    options = map(str, command_of(tmp_path, weights, images))
    command = [*program, *options, "training.checkpoint_every=1", "resume=auto"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while process.poll() is None and not [*tmp_path.glob("*/checkpoints/*.ckpt")]:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not [*tmp_path.glob("*/concept.safetensors")]
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    (resumed,) = tmp_path.glob("*/concept.safetensors")
    ours, theirs = load_file(resumed), load_file(run_folder / "concept.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_concept_is_low_rank_and_samples_with_the_programs(run_folder, weights, tmp_path):
    concept = Concept.load(run_folder / "concept.safetensors")
    assert not concept.keys_values and {c.u.shape[1] for c in concept.low_rank.values()} == {2}
    assert concept.modifiers.shape[1] == 32 + 64
    command = ("--device", "cpu", "--steps", 2, "--n-samples", 1, "--model", YAML, "--checkpoint", weights)
    dual = ("--concept", run_folder / "concept.safetensors", "--prompt", "a V* on the beach")
    size = ("--original-size", 64, 48, "--crop", "2,4")
    run_main("sample_dci.py", *dual, *command, *size, "--outdir", tmp_path / "dci")
    size = ("--original-size", "64x48", "--H", 16, "--W", 64)
    run_main("txt2img.py", "--prompt", "a cat", *command, *size, "--outdir", tmp_path / "plain")
    shapes = [Image.open(next((tmp_path / name / "samples").glob("*.png"))).size for name in ("dci", "plain")]
    assert shapes == [(32, 32), (64, 16)]
    assert '"crop": [\n   2,\n   4' in (tmp_path / "dci/prompts.json").read_text().replace("    ", " ")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["custom-diffusion", "textual-inversion"])
def test_the_other_methods_train_too(method, weights, images, tmp_path):
    """With the configurations as they are, but for what belongs to a machine, and one step."""
    config = ("--config", ROOT / f"configs/train/{method}-sdxl.yaml", "--logdir", tmp_path)
    short = ("concept.class_noun=cat", "training.steps=1", "training.precision=fp32")
    run_main("train_ico.py", *config, *model_and_data(weights, images), *short, *QUIET)
    (file,) = tmp_path.glob("*/concept.safetensors")
    concept = Concept.load(file)
    assert bool(concept.changed) == (method == "custom-diffusion")
    assert concept.modifiers.shape[1] == 96 and not len(concept.prefixes)


@pytest.mark.slow
def test_aspect_ratios_are_kept_in_every_family(images, tmp_path, capfd):
    """Images of three shapes, on the embedded model of Stable Diffusion 1.x's shape."""
    config = ("--config", ROOT / "configs/train/ico-tiny.yaml", "--logdir", tmp_path)
    short = (f"data.images={images}", "data.crop=bucket", "training.steps=1", "training.batch_size=3")
    run_main("train_ico.py", *config, *short, *QUIET)
    assert [*tmp_path.glob("*/concept.safetensors")]


@pytest.mark.slow
def test_sizes_on_the_command_line_that_are_none(capfd):
    refused(run_here(capfd, "txt2img.py", "--prompt", "a cat", "--crop", "wide"), "--crop wide", "such as --crop 1024 768")
    refused(run_here(capfd, "txt2img.py", "--prompt", "a cat", "--crop", 0, 0), "has no condition on an image's size")


def test_concepts_are_inspected_compressed_and_merged(learned, xl):
    tokens = inspect_tokens(learned, xl, 2, contexts=False)
    assert [token.name for token in tokens][:1] + [token.name for token in tokens][-1:] == [
        "<new1>, encoder 1",
        f"<new{len(learned.modifiers)}>, encoder 2",
    ]
    assert compress(learned, xl, rank=1).concept.low_rank
    other = dataclasses.replace(learned, modifiers=learned.modifiers + 0.01)
    merged = merge([learned, other], xl, ["a dog in the snow", "a car"], "photo of a {}", lambda _: None)
    assert merged.kept < 1e-2 and merged.concept.modifiers.shape == (2 * len(learned.modifiers), 96)


@pytest.mark.slow
def test_two_processes_learn_the_same(weights, images, tmp_path):
    """Images of several shapes, low rank, and regularization; fp64 sums, so that the order means nothing."""
    options = ("training.steps=3", "training.micro_batch=2", "training.gradient_sum=fp64")
    command = (*CONFIG, *model_and_data(weights, images), *SHORT, *options)
    ok(run("train_ico.py", *command, "--logdir", tmp_path / "one"))
    ok(run("train_ico.py", *command, "--logdir", tmp_path / "two", "training.devices=2"))
    one, two = (load_file(next((tmp_path / n).iterdir()) / "concept.safetensors") for n in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name].float(), tensor.float(), rtol=1e-3, atol=1e-5)


# Both branches.


@pytest.fixture(scope="module")
def applied(learned, weights):
    model = load_model(YAML, weights)
    learned.apply(model)
    return model, learned


@pytest.mark.parametrize("solver", mostly_slow(SOLVERS, "dpm++2m"))
def test_every_solver_and_a_concept_weight_of_one_is_plain_sampling(applied, solver):
    model, concept = applied
    options = sampling_options(model, steps=3, solver=solver, original_size=(64, 48))
    prompt = parse_prompt("a V* on the beach", concept.names)
    plain = sample(model, concept, SampleRequest(prompt, [0, 1], options, None))
    dual = dual_branch(model, agg_time=0.6, agg_lambda=-1e6)
    # The random model magnifies rounding.
    assert (sample(model, concept, SampleRequest(prompt, [0, 1], options, dual)) - plain).abs().max() < 1e-3
    assert text_to_image(model, "a cat", [0], options).shape == (1, 3, 32, 32)


def test_the_auxiliary_branch_has_a_pooled_text_of_its_own(applied):
    model, concept = applied
    prompt = parse_prompt("a V* on the beach", concept.names)
    size = ImageSize((64, 48), (1, 2), (32, 32)).row()
    contexts = BranchContexts.of(model, concept, [prompt], "", size)
    nothing, own, other = contexts.vectors
    expected = model.text_encoder.conditions([prompt.auxiliary_ids], None, size)
    assert torch.equal(other, expected.vector) and torch.equal(contexts.auxiliary, expected.tensor)
    assert (own[:, :48] - other[:, :48]).abs().max() > 1e-3
    assert torch.equal(own[:, 48:], other[:, 48:]) and torch.equal(nothing[:, 48:], other[:, 48:])
    assert nothing[:, :48].abs().max() == 0 and contexts.unconditional.abs().max() == 0


# Aspect ratios.


def test_the_usual_buckets():
    """Podell et al. 2023, Appendix I."""
    found = buckets(1024, 32)
    assert all(h % 64 == w % 64 == 0 and (w, h) in found for h, w in found)
    listed = {(512, 2048), (512, 1856), (576, 1664), (704, 1344), (768, 1344), (832, 1152), (896, 1088), (1024, 1024)}
    assert listed | {size[::-1] for size in listed} <= set(found)
    assert nearest_bucket(3000, 2000, 1024, 32) == (1216, 832)
    assert nearest_bucket(50, 50, 64, 16) == (64, 64)


def test_images_of_several_shapes_share_a_step(xl, images):
    """Each image counts the same, and its size is told."""
    options = DataConfig(crop="bucket", flip=False)
    images = read_references(images, options, 32, multiple=xl.config.size_multiple)
    assert [tuple(p.pixels.shape[-2:]) for p in images] == [(32, 32), (40, 24), (24, 40)]
    dataset = ConceptDataset(xl, images, [], options)
    (parts,) = [dataset.__getitems__([[BatchSlot(i, 0, i) for i in (0, 1, 2, 1)]])]
    assert sorted(part.share for part in parts) == [0.25, 0.25, 0.5]
    assert [part.sizes[0, :2].tolist() for part in parts] == [[60, 60], [80, 40], [44, 90]]
    assert sum(part.share for part in parts) == 1


def test_sums_in_single_precision():
    parameter = torch.nn.Parameter(torch.zeros(2))
    for dtype in (torch.float32, torch.float64):
        sums = GradientSum([parameter], dtype)
        for value in (1.0, 2.0):
            parameter.grad = torch.full((2,), value)
            sums.accumulate()
            assert sums.sums[0].dtype == dtype
        sums.write_mean(2)
        assert parameter.grad.tolist() == [1.5, 1.5]


# The full size.


def test_a_concept_of_rank_16_takes_at_most_15_mb(learned, tmp_path):
    """With three modifier tokens and twenty images' contexts of four tokens each."""
    with torch.device("meta"):
        model = LatentDiffusion(presets.sdxl())
    shapes = {n: p.shape for n, p in model.named_parameters() if n.endswith(KEYS_VALUES)}
    assert len(shapes) == 140
    half = {"dtype": torch.float16}
    large = dataclasses.replace(
        learned,
        low_rank={n: LowRank(torch.ones(r, 16, **half), torch.ones(16, c, **half)) for n, (r, c) in shapes.items()},
        modifiers=torch.ones(3, 2048),
        prefixes=torch.ones(20, 3, 2048, **half),
        suffixes=torch.ones(20, 1, 2048, **half),
    )
    large.save(tmp_path / "concept.safetensors")
    assert 14e6 < (tmp_path / "concept.safetensors").stat().st_size <= 15e6


def test_a_step_of_low_rank_leaves_most_of_24_gb_to_activations():
    """Weights, and what is trained with its gradients and Adam's two moments; on meta tensors."""
    with torch.device("meta"):
        model = LatentDiffusion(presets.sdxl()).requires_grad_(False)
    cast_frozen_weights(model, "bf16")
    frozen = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    matrices = [p.shape for n, p in model.named_parameters() if n.endswith(KEYS_VALUES)]
    trained = 4 * sum(4 * 16 * (rows + columns) for rows, columns in matrices)
    assert frozen + trained < 7.5e9
    assert model.vae_dtype == torch.float32
