"""Every format at small size, made and saved by the libraries that Stable Diffusion's users have them from."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import tiny_models
import torch
from helpers import LINUX, ROOT, mostly_slow
from safetensors.torch import load_file, save_file

from ldm import checkpoint
from ldm import config as configuration
from ldm.checkpoint import fingerprint, load_model, read_config
from ldm.config import ModelConfig
from ldm.errors import UserError
from ldm.formats import presets
from ldm.formats.diffusers_folder import find_weights
from ldm.formats.hub import anchored
from ldm.formats.recognise import recognise
from ldm.runtime import mapped_files

OFFICIAL = ROOT / "tests/data/official"


SMALL = {"v1": tiny_models.small_v1(), "v2": tiny_models.small_v2(), "xl": tiny_models.small_xl()}


@pytest.fixture(scope="module", params=mostly_slow(SMALL, "v2"))
def theirs(request):
    torch.manual_seed(1)
    return tiny_models.make(SMALL[request.param])


@pytest.fixture(scope="module")
def expected(theirs):
    return tiny_models.Expected(theirs, side=8)


@pytest.fixture(scope="module")
def known(theirs, tmp_path_factory):
    """The fingerprint that every format must have."""
    folder = tmp_path_factory.mktemp("known")
    save_file(theirs.state, folder / "m.safetensors")
    return fingerprint(load_model(tiny_models.write_yaml(theirs.config, folder / "m.yaml"), folder / "m.safetensors"))


class ModelCheckpoint:
    """A callback as Lightning pickles it, under a module name that need not be installed to read the file."""

    def __init__(self):
        self.best_model_path, self.best_model_score = "epoch=3.ckpt", torch.tensor(0.25)


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


def with_callback(state):
    return {"state_dict": state, "global_step": 470000, "callbacks": {ModelCheckpoint: {"x": ModelCheckpoint()}}}


def save_with_callback(state, file):
    # pickle looks a class up by its name when it writes it.
    module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = ModelCheckpoint
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        torch.save(with_callback(state), file)
    finally:
        sys.modules.pop(module.__name__)
        if before:
            sys.modules[module.__name__] = before


def halves(state):
    return {name: tensor.half() for name, tensor in state.items()}


SINGLE_FILES = {
    ".ckpt": lambda state, place: torch.save({"state_dict": state}, place / "m.ckpt"),
    ".ckpt without a training state": lambda state, place: torch.save(state, place / "m.ckpt"),
    ".ckpt of before torch 1.6": lambda state, place: torch.save(
        {"state_dict": state}, place / "m.ckpt", _use_new_zipfile_serialization=False
    ),
    ".ckpt with a Lightning callback": lambda state, place: save_with_callback(state, place / "m.ckpt"),
    ".ckpt fp16": lambda state, place: torch.save({"state_dict": halves(state)}, place / "m.ckpt"),
    ".safetensors": lambda state, place: save_file(state, place / "m.safetensors"),
    ".safetensors fp16": lambda state, place: save_file(halves(state), place / "m.safetensors"),
}
FOLDERS = {
    "fp32": {},
    "fp16 variant": {"variant": "fp16"},
    "sharded": {"shard": "300KB"},
    "fp16 variant, sharded": {"variant": "fp16", "shard": "300KB"},
}


@pytest.mark.parametrize("name", mostly_slow(SINGLE_FILES, ".ckpt with a Lightning callback"))
def test_single_files_equal_the_libraries(theirs, expected, known, name, tmp_path):
    place = tmp_path / "files"
    place.mkdir()
    SINGLE_FILES[name](tiny_models.published_extras(theirs.state), place)
    model = load_model(tiny_models.write_yaml(theirs.config, tmp_path / "m.yaml"), next(place.iterdir()))
    assert max(expected.errors(model).values()) <= 1e-5
    assert fingerprint(model) == known
    assert not any(buffer.is_meta for buffer in model.buffers())


@pytest.mark.parametrize("name", mostly_slow(FOLDERS, "fp16 variant, sharded"))
def test_diffusers_folders_equal_the_libraries_and_tell_their_configuration(theirs, expected, known, name, tmp_path):
    folder = tiny_models.save_folder(theirs, tmp_path / "folder", **FOLDERS[name])
    if "sharded" in name:
        assert len(find_weights(folder / "unet")) > 2
    model = load_model(folder)
    assert model.config == theirs.config
    assert max(expected.errors(model).values()) <= 1e-5
    assert fingerprint(model) == known


def test_folders_of_older_releases(theirs, expected, tmp_path):
    """Pickled files, with the names that transformers 4 and diffusers before 0.14 gave."""
    folder = tiny_models.save_folder(theirs, tmp_path / "folder")
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = folder / part / f"{stem}.safetensors"
        state = load_file(file)
        file.unlink()
        if part == "text_encoder":
            stem, state = "pytorch_model", {f"text_model.{n.removeprefix('text_model.')}": t for n, t in state.items()}
        if part == "vae":
            old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
            for new, before in old.items():
                state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{before}."): t for name, t in state.items()}
        torch.save(state, folder / part / f"{stem}.bin")
    assert max(expected.errors(load_model(folder)).values()) <= 1e-5


def test_weights_of_any_format_for_a_given_configuration(theirs, expected, tmp_path):
    folder = tiny_models.save_folder(theirs, tmp_path / "folder")
    model = load_model(tiny_models.write_yaml(replace(theirs.config, name="mine"), tmp_path / "m.yaml"), folder)
    assert model.config.name == "mine"
    assert max(expected.errors(model).values()) <= 1e-5
    with pytest.raises(UserError, match="has no averaged weights"):
        load_model(folder, ema=True)


def test_of_two_precisions_the_one_that_is_asked_for_is_read(theirs, tmp_path):
    folder = tiny_models.save_folder(theirs, tmp_path / "folder")
    for part in ("unet", "vae", "text_encoder"):
        file = find_weights(folder / part)[0]
        save_file(halves(load_file(file)), file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert ".fp16." in find_weights(folder / "unet", half=True)[0].name
    model = load_model(folder, dtype=torch.float16)
    assert {p.dtype for p in (*model.unet.parameters(), *model.text_encoder.parameters())} == {torch.float16}
    assert model.vae_dtype == (torch.float32 if theirs.config.autoencoder.force_upcast else torch.float16)
    assert {p.dtype for p in load_model(folder, dtype=None).parameters()} == {torch.float32}


@pytest.fixture
def small(tmp_path):
    """(configuration file, state dict, where to save it) of a small v1 model."""
    theirs = tiny_models.make(tiny_models.small_v1())
    return tiny_models.write_yaml(theirs.config, tmp_path / "m.yaml"), theirs.state, tmp_path / "m.safetensors"


@pytest.mark.slow
def test_precision_is_the_one_asked_for(small):
    yaml, state, file = small
    save_file(halves(state), file)
    assert {p.dtype for p in load_model(yaml, file).parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(yaml, file, dtype=None).parameters()} == {torch.float16}
    assert {p.dtype for p in load_model(yaml, file, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_averaged_weights_only_on_request(small):
    yaml, state, file = small
    unet = [name for name in state if name.startswith("model.")]
    averages = {"model_ema." + n.removeprefix("model.").replace(".", ""): state[n] + 1 for n in unet}
    assert "model_ema.diffusion_modelinput_blocks00weight" in averages
    save_file({**state, **averages}, file)
    plain, averaged = load_model(yaml, file).state_dict(), load_model(yaml, file, ema=True).state_dict()
    for name in plain:
        assert torch.equal(plain[name], state[name])
        assert torch.equal(averaged[name], state[name] + (1 if name in unet else 0))
    save_file({**state, **dict(list(averages.items())[1:])}, file)
    with pytest.raises(UserError, match="m.safetensors has no averaged weights model_ema.diffusion_model"):
        load_model(yaml, file, ema=True)


def test_a_model_survives_that_its_file_is_written_anew(small):
    yaml, state, file = small
    checkpoint.save_weights(state, file)
    model = load_model(yaml, file, dtype=None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoint.save_weights({name: torch.zeros_like(tensor) for name, tensor in state.items()}, file)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not load_file(file).popitem()[1].any()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("skip", [2, 3])
def test_clip_skip_is_the_hidden_state_of_an_earlier_layer(skip, small):
    yaml, state, file = small
    theirs = tiny_models.make(tiny_models.small_v1())
    save_file(theirs.state, file)
    model = load_model(yaml, file, clip_skip=skip)
    ids = model.text_encoder.tokenize(tiny_models.PROMPTS)
    hidden = theirs.text(ids, output_hidden_states=True).hidden_states[-skip]
    inner = getattr(theirs.text, "text_model", theirs.text)
    expected = inner.final_layer_norm(hidden)
    assert tiny_models.relative_error(model.text_encoder(tiny_models.PROMPTS), expected) < 1e-5
    assert tiny_models.relative_error(load_model(yaml, file).text_encoder(tiny_models.PROMPTS), expected) > 1e-3
    with pytest.raises(UserError, match=r"clip skip 4: expected 1 .* to 3"):
        load_model(yaml, file, clip_skip=4)


@pytest.mark.slow
@torch.no_grad()
def test_clip_skip_of_openclip(tmp_path):
    theirs = tiny_models.make(tiny_models.small_v2())
    folder = tiny_models.save_folder(theirs, tmp_path / "folder")
    found = load_model(folder, clip_skip=2).text_encoder(tiny_models.PROMPTS)
    ids = tiny_models.open_clip.tokenizer.SimpleTokenizer()(tiny_models.PROMPTS, 77)
    hidden = theirs.text(ids, output_hidden_states=True).hidden_states[-2]
    inner = getattr(theirs.text, "text_model", theirs.text)
    assert tiny_models.relative_error(found, inner.final_layer_norm(hidden)) < 1e-5


def test_openclip_pads_with_zero_behind_the_first_closing_end_token():
    encoder = checkpoint.LatentDiffusion(tiny_models.small_v2()).text_encoder
    prompts = ["a dog", "", "very " * 80]
    ids = tiny_models.open_clip.tokenizer.SimpleTokenizer()(prompts, 77)
    with pytest.warns(UserWarning, match="cut off"):
        found = encoder.embed(encoder.tokenize(prompts))
    assert torch.equal(found, encoder.token_table[ids])
    extra = torch.randn(2, 64)
    framed = torch.tensor([[49406, 49408, 49409, 320, 49407, 49407, 49407]])
    found = encoder.embed(framed, extra)
    assert torch.equal(found[0, 1:3], extra)
    assert torch.equal(found[0, 4:], encoder.token_table[torch.tensor([49407, 0, 0])])


def test_our_yaml_files_are_the_presets():
    for name, preset in (
        ("sd-v1", presets.sd_v1()),
        ("sd-v2", presets.sd_v2("eps")),
        ("sd-v2-v", presets.sd_v2("v")),
        ("sdxl", presets.sdxl()),
    ):
        ours = configuration.load(ModelConfig, ROOT / f"configs/model/{name}.yaml")
        ours.unet.attention_resolutions = ours.unet.attention_resolutions[::-1]  # the order means nothing
        assert ours == preset


@pytest.mark.parametrize(
    ("file", "preset"),
    [
        ("v1-inference", presets.sd_v1()),
        ("v2-inference", presets.sd_v2("eps")),
        ("v2-inference-v", presets.sd_v2("v")),
        ("sd_xl_base", presets.sdxl()),
    ],
    ids=["v1", "v2", "v2-v", "xl"],
)
def test_official_yaml_files_load_as_they_are(file, preset):
    assert read_config(OFFICIAL / f"{file}.yaml") == preset


CHANGES = {
    "layer: last": ("penultimate", "last", None),
    "unknown target 'os.system'": (
        "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "os.system",
        "model.params.unet_config",
    ),
    "unknown key 'model.params.unet_config.params.context_dims'; did you mean 'context_dim'": (
        "context_dim: 1024",
        "context_dim: 1024\n        context_dims: 3",
        "",
    ),
    "unknown key 'model.params.parametrization'": ("channels: 4\n    cond", "parametrization: v\n    cond", ""),
    "attn_resolutions=[16]": ("attn_resolutions: []", "attn_resolutions: [16]", ""),
    "conditioning_key=hybrid": ("conditioning_key: crossattn", "conditioning_key: hybrid", "expected crossattn"),
    "a UNet of 9 channels": ("in_channels: 4", "in_channels: 9", ""),
    "use_spatial_transformer=False": ("        use_spatial_transformer: True\n", "", "expected True"),
    "expected a value of type": ("model_channels: 320", "model_channels: wide", "unet.model_channels"),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_an_official_yaml_file_says_otherwise_is_an_error(message, tmp_path):
    old, new, further = CHANGES[message]
    text = (OFFICIAL / "v2-inference.yaml").read_text()
    assert old in text
    (tmp_path / "c.yaml").write_text(text.replace(old, new))
    if further is None:
        assert read_config(tmp_path / "c.yaml").text_encoder.layers == 24
        return
    with pytest.raises(UserError) as error:
        read_config(tmp_path / "c.yaml")
    assert message in str(error.value) and further in str(error.value)


def state_with_context(width):
    unet = "model.diffusion_model."
    first = torch.zeros(320, 4, 3, 3)
    return {
        f"{unet}input_blocks.0.0.weight": first,
        f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, width),
    }


def test_a_single_file_tells_its_architecture():
    assert recognise(state_with_context(768), "x", None) == presets.sd_v1()
    assert recognise(state_with_context(1024), "x", 110000) == presets.sd_v2("eps")
    with pytest.warns(UserWarning, match="taken to be v .* configs/model/sd-v2.yaml as model="):
        assert recognise(state_with_context(1024), "x", 875000) == presets.sd_v2("v")
    with pytest.raises(UserError, match="x holds a model with a text context 2048 wide, expected 768"):
        recognise(state_with_context(2048), "x", None)


FOLDER_CHANGES = {
    "unet/config.json": ({"addition_embed_type": "image"}, "addition_embed_type=image: expected text_time"),
    "vae/config.json": ({"shift_factor": 0.1}, "shift_factor=0.1"),
    "text_encoder/config.json": ({"vocab_size": 49409}, "models with added tokens are not supported"),
    "tokenizer/special_tokens_map.json": ({"pad_token": "!"}, "pad_token=!: expected <|endoftext|>"),
    "scheduler/scheduler_config.json": ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule=squaredcos_cap_v2: expected"),
    "model_index.json": ({"_class_name": "FluxPipeline"}, "holds a FluxPipeline"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of a small v1 model; copy it before changing it."""
    return tiny_models.save_folder(tiny_models.make(tiny_models.small_v1()), tmp_path_factory.mktemp("saved") / "folder")


@pytest.mark.parametrize("file", FOLDER_CHANGES)
def test_a_folder_of_another_architecture_is_refused(file, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "folder")
    change, message = FOLDER_CHANGES[file]
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | change))
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert message in str(error.value)
    (folder / file).write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        load_model(folder)


def test_a_damaged_configuration_of_a_folder_is_named_in_one_line(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "folder")
    for file, key in (
        ("unet", "block_out_channels"),
        ("unet", "attention_head_dim"),
        ("unet", "down_block_types"),
        ("unet", "sample_size"),
        ("vae", "block_out_channels"),
    ):
        place = folder / file / "config.json"
        whole = place.read_text()
        for value in ("x", [], {}, [1, "a"]):
            place.write_text(json.dumps(json.loads(whole) | {key: value}))
            with pytest.raises(UserError) as error:
                load_model(folder)
            assert "folder" in str(error.value) and "\n" not in str(error.value), (key, value)
        place.write_text(whole)
    load_model(folder)


def test_what_the_scheduler_asks_for(tmp_path):
    folder = tiny_models.save_folder(tiny_models.make(tiny_models.small_v2()), tmp_path / "folder")
    file = folder / "scheduler/scheduler_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}))
    config = load_model(folder).config
    assert config.schedule.zero_terminal_snr
    assert config.sampling["spacing"] == "trailing"
    file.write_text(json.dumps(content | {"prediction_type": "sample"}))
    with pytest.raises(UserError, match="prediction_type=sample: expected one of epsilon, v_prediction"):
        load_model(folder)


def test_shards_that_are_not_there_or_elsewhere(tmp_path):
    folder = tiny_models.save_folder(tiny_models.make(tiny_models.small_v1()), tmp_path / "folder", shard="300KB")
    find_weights(folder / "unet")[0].unlink()
    with pytest.raises(UserError, match="which is not beside it"):
        load_model(folder)
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../vae/diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(UserError, match="which is not beside it"):
        load_model(folder)


def test_a_hub_id_comes_from_the_cache_when_offline(theirs, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="no file or folder owner/name, and the hub cannot be reached"):
        load_model("owner/name")
    cached = tmp_path / "cache/models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("0" * 40)
    tiny_models.save_folder(theirs, cached / "snapshots" / ("0" * 40))
    model = load_model("owner/name")
    assert max(expected.errors(model).values()) <= 1e-5


def test_names_that_are_no_hub_ids(tmp_path):
    assert anchored("owner/name", tmp_path) == "owner/name"
    (tmp_path / "owner/name").mkdir(parents=True)
    assert anchored("owner/name", tmp_path) == str(tmp_path / "owner/name")
    for missing in ("weights/sd.ckpt", "a.safetensors"):
        with pytest.raises(UserError, match=f"no checkpoint at {missing}"):
            load_model(missing)
    with pytest.raises(UserError, match="no model at /nothing: expected a YAML file, a .ckpt"):
        load_model("/nothing")


@LINUX
def test_half_precision_is_not_copied(small):
    """Loading in the file's precision maps the file: no tensor has memory of its own."""
    yaml, state, file = small
    save_file(halves(state), file)
    parameters = list(load_model(yaml, file, dtype=torch.float16).parameters())
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(file))]
    outside = [p for p in parameters if not any(int(a, 16) <= p.data_ptr() < int(b, 16) for a, b in mapped)]
    assert not outside and len(parameters) > 100


def mapped_bytes():
    """Memory of this process that is files' pages."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssFile"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what is mapped")
def test_pages_are_handed_back_and_read_again(tmp_path):
    size = 64 * 2**20
    original = torch.arange(size // 4, dtype=torch.int32)
    save_file({"x": original}, tmp_path / "x.safetensors")
    tensor = checkpoint.read_safetensors(tmp_path / "x.safetensors")[0]["x"]
    release = mapped_files.releaser()
    assert torch.equal(tensor, original)
    before = mapped_bytes()
    release(tensor)
    assert before - mapped_bytes() > 0.9 * size
    assert torch.equal(tensor, original)
    own = original.clone()
    release(own)
    assert torch.equal(own, original)
