"""Whether training learns: the loss against its closed form, and a short run that makes images more like the references."""

import dataclasses

import pytest
import torch
from helpers import ROOT, run_main

from dci.concept.concept_file import Concept
from dci.concept.prompts import parse_prompt
from dci.dual_branch.options import sampling_options
from dci.dual_branch.sampling import SampleRequest, sample
from dci.finetuning.config import ConceptConfig, FinetuneConfig
from dci.finetuning.dataset import ConceptBatch
from dci.finetuning.module import ICOTraining
from ldm.embedded_encoders import SIZE, load_instance_encoder
from ldm.images import list_images, read_image, square, to_tensor
from ldm.tokenizer import frame

CAT = ROOT / "data/concepts/cat"


def batch(weights=None):
    """Two references with random latents, noise and timesteps."""
    noise, posterior_noise = torch.randn(2, 2, 4, 16, 16)
    moments, t = torch.randn(2, 8, 16, 16) - 1, torch.tensor([10, 900])
    return ConceptBatch(
        [0, 1],
        ["", ""],
        torch.tensor([frame([])] * 2),
        torch.empty(0, 3, 64, 64),
        moments,
        weights,
        t,
        noise,
        posterior_noise,
    )


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize(("off_by", "loss"), [(0, 0), (1, 1), (-2, 4)])
def test_the_loss_is_the_square_of_the_error(parameterization, off_by, loss, tiny):
    """v is sqrt(alpha) noise - sqrt(1 - alpha) x_0 (Salimans & Ho 2022, Sec. 4)."""
    schedule = dataclasses.replace(tiny.config.schedule, parameterization=parameterization)
    tiny.config = dataclasses.replace(tiny.config, schedule=schedule)
    module, parts = ICOTraining(tiny, FinetuneConfig(concept=ConceptConfig(class_noun="cat")), images=2), batch()
    alpha = tiny.alphas_cumprod[parts.t][:, None, None, None]
    x_0 = module.latents(parts)
    answer = parts.noise if parameterization == "eps" else alpha.sqrt() * parts.noise - (1 - alpha).sqrt() * x_0
    module.predict = lambda x, t, context, attend: answer + off_by
    torch.testing.assert_close(module.loss(parts), torch.tensor(float(loss)))


def test_the_loss_counts_where_the_weights_are(tiny):
    weights = torch.zeros(2, 1, 16, 16)
    weights[..., :8] = 1
    module, parts = ICOTraining(tiny, FinetuneConfig(concept=ConceptConfig(class_noun="cat")), images=2), batch(weights)
    for half, loss in ((slice(0, 8), 1.0), (slice(8, 16), 0.0)):
        wrong = parts.noise.clone()
        wrong[..., half] += 1
        module.predict = lambda x, t, context, attend, wrong=wrong: wrong
        torch.testing.assert_close(module.loss(parts), torch.tensor(loss))


@pytest.mark.slow
def test_fifty_steps_make_images_more_like_the_references_than_the_base_model_does(tiny, tmp_path):
    options = ("training.steps=50", "training.batch_size=4", "training.micro_batch=4", "validation.every=0")
    run_main("train_ico.py", "--config", ROOT / "configs/train/ico-tiny.yaml", "--logdir", tmp_path, *options)
    [file] = tmp_path.glob("*/concept.safetensors")
    concept, encoder = Concept.load(file), load_instance_encoder()

    def likeness():
        """Mean cosine of eight images of the concept to the references, by the embedded instance encoder."""
        prompt = parse_prompt("a photo of a V* cat", concept.names)
        images = sample(tiny, concept, SampleRequest(prompt, list(range(8)), sampling_options(tiny, steps=15), None))
        references = torch.stack([to_tensor(square(read_image(file), SIZE)) for file in list_images(CAT)])
        with torch.inference_mode():
            return float((encoder.image_features(images) @ encoder.image_features(references).T).mean())

    before = base_likeness(tiny, concept, likeness)
    concept.apply(tiny)
    assert likeness() > before + 0.02


def base_likeness(model, concept, likeness):
    """The same of the base model, whose modifier tokens are still the words that they start from."""
    from dci.concept.modifier_tokens import initial_embeddings

    learned = concept.modifiers.clone()
    concept.modifiers.copy_(initial_embeddings(["ktn", "pll"], model.text_encoder.token_table))
    try:
        return likeness()
    finally:
        concept.modifiers.copy_(learned)
