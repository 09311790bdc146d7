"""Every format at Stable Diffusion 1.x's full depth, with random weights: out, in again, and read by diffusers.

python -m pytest -m fullsize tests/concept/test_fullsize_foreign.py     (minutes; 6 GiB of memory, 8 GB of disk)
"""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from foreign_models import concept_of, relative
from tiny_models import computing_in, mapped_weights

from dci.concept.foreign.export import export
from dci.concept.foreign.importing import import_concept
from ldm.diffusion import LatentDiffusion
from ldm.formats import presets
from ldm.formats.diffusers_export import write_folder

pytestmark = pytest.mark.fullsize

FILES = {
    "lora": ["mycat-lora.safetensors", "mycat.safetensors"],
    "diff": ["mycat-diff.safetensors", "mycat.safetensors"],
    "diffusers": ["pytorch_custom_diffusion_weights.bin", "<new1>.bin", "<new2>.bin"],
    "adobe": ["delta.ckpt"],
    "checkpoint": ["mycat-checkpoint.safetensors", "mycat.safetensors"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(11)
    with torch.device("meta"):
        model = LatentDiffusion(presets.sd_v1()).eval().requires_grad_(False)
    model.load_state_dict(mapped_weights(model, tmp_path_factory.mktemp("model") / "weights"), assign=True)
    return model


@pytest.fixture(scope="module")
def concept(model):
    return concept_of(model)


@torch.no_grad()
@pytest.mark.parametrize("to", FILES)
def test_out_and_in_again(model, concept, to, tmp_path):
    export(concept, model, to, tmp_path)
    sizes = {file: (tmp_path / file).stat().st_size / 1e6 for file in FILES[to]}
    print(to, ", ".join(f"{file} {size:.1f} MB" for file, size in sizes.items()))
    back = import_concept([tmp_path / file for file in FILES[to]], "cat", config=model.config, load=lambda: model).concept
    assert torch.equal(back.modifiers, concept.modifiers) and back.names == concept.names and back.base == concept.base
    weights, expected, base = back.weights(model), concept.weights(model), model.state_dict()
    assert weights.keys() == expected.keys() and len(weights) == 32
    for name, weight in weights.items():
        largest = max(expected[name].abs().max(), (expected[name] - base[name].float()).abs().max())
        assert (weight - expected[name]).abs().max() <= 2**-11 * largest, name


@torch.no_grad()
def test_diffusers_predicts_the_same_noise(model, concept, tmp_path):
    """The UNet alone, in fp32: ours with the concept, and theirs with the exported LoRA loaded by its own loader."""
    write_folder(model.state_dict(), model.config, tmp_path / "base")
    export(concept, model, "lora", tmp_path)
    x, t, text = torch.randn(1, 4, 32, 32), torch.tensor([421]), torch.randn(1, 77, model.config.unet.context_dim)
    with computing_in(model.unet, torch.float32):
        plain = model.unet(x, t, text)
    undo = concept.apply(model)
    with computing_in(model.unet, torch.float32):
        ours = model.unet(x, t, text)
    undo()
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "base/unet", torch_dtype=torch.float16)
    pipeline = StableDiffusionPipeline(None, None, None, theirs, None, None, None, requires_safety_checker=False)
    pipeline.load_lora_weights(str(tmp_path), weight_name="mycat-lora.safetensors")
    with computing_in(theirs, torch.float32):
        error = relative(theirs(x, t, text).sample, ours)
    print(f"with the LoRA {error:.1e}, without the concept {relative(plain, ours):.1e}")
    assert error < 1e-4 < 0.1 * relative(plain, ours)
