"""Files that nobody should load: each is refused in one line with exit code 2, and nothing of them is run."""

import os
import pickle
import warnings
import zipfile

import pytest
import tiny_models
import torch
from helpers import ROOT, mostly_slow, run
from safetensors.torch import save_file

from ldm.checkpoint import TOKEN_IDS, TOKEN_ROWS, load_model
from ldm.errors import UserError
from ldm.formats.pickled import read_pickled


class Evil:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def evil_by_name(trace, module, name):
    """The pickle of a call of module.name, in the opcodes of protocol 2."""
    return (
        b"\x80\x02c"
        + f"{module}\n{name}\n".encode()
        + b"X"
        + len(str(trace)).to_bytes(4, "little")
        + str(trace).encode()
        + b"\x85R."
    )


def torch_save(content, file, **options):
    torch.save(content, file, **options)
    return file


def plain_pickle(content, file, protocol):
    file.write_bytes(pickle.dumps(content, protocol))
    return file


def beside_callbacks(file, trace):
    """A hostile object among what a training framework would leave."""
    return torch_save({"state_dict": {"x": torch.zeros(1)}, "callbacks": {"a": Evil(trace)}}, file)


HOSTILE = {
    "zip": lambda file, trace: torch_save({"state_dict": {}, "x": Evil(trace)}, file),
    "beside callbacks": beside_callbacks,
    "legacy": lambda file, trace: torch_save({"x": Evil(trace)}, file, _use_new_zipfile_serialization=False),
    "plain pickle, protocol 2": lambda file, trace: plain_pickle(Evil(trace), file, 2),
    "plain pickle, protocol 4": lambda file, trace: plain_pickle({"state_dict": Evil(trace)}, file, 4),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_that_runs_a_command_is_refused_and_named(kind, tmp_path):
    trace = tmp_path / "trace"
    file = HOSTILE[kind](tmp_path / "evil.ckpt", trace)
    with pytest.raises(UserError, match=r"evil.ckpt is refused, nothing of it was run: it asks for posix.system"):
        load_model(file)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("subprocess", "Popen"),
        ("torch.serialization", "load"),
        ("pytorch_lightningx", "run"),
        ("runpy", "run_path"),
        ("operator", "attrgetter"),
    ],
)
def test_other_names_are_refused_too(module, name, tmp_path):
    (tmp_path / "evil.ckpt").write_bytes(evil_by_name(tmp_path / "trace", module, name))
    with pytest.raises(UserError, match=f"it asks for {module.replace('__builtin__', 'builtins')}.{name}"):
        load_model(tmp_path / "evil.ckpt")


@pytest.mark.parametrize("name", ["os system", "utilities.os.system", "callbacks.ModelCheckpoint"])
def test_a_frameworks_name_is_never_imported(name, tmp_path):
    """Calling what claims to be a framework's gives something inert, and the file is then no checkpoint."""
    trace = tmp_path / "trace"
    (tmp_path / "evil.ckpt").write_bytes(evil_by_name(f"touch {trace}", "pytorch_lightning", name))
    with pytest.raises(UserError), warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(tmp_path / "evil.ckpt")
    assert not trace.exists()


def test_two_pickles_in_an_archive_are_both_looked_at(tmp_path):
    file = torch_save({"x": torch.zeros(2)}, tmp_path / "two.ckpt")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("two/other/data.pkl", pickle.dumps(Evil(tmp_path / "trace"), 2))
    with pytest.raises(UserError, match="it asks for posix.system"):
        read_pickled(file)


def test_configurations_of_frameworks_are_read_past(tmp_path):
    """What Lightning and OmegaConf leave in hyper_parameters, numpy's numbers, paths and namespaces."""
    import argparse
    from collections import defaultdict
    from pathlib import PurePosixPath

    import numpy as np
    from lightning_utilities.core.apply_func import apply_to_collection  # noqa: F401  (Lightning is installed)
    from omegaconf import OmegaConf
    from pytorch_lightning.utilities.parsing import AttributeDict

    content = {
        "state_dict": {"x": torch.ones(2)},
        "hyper_parameters": AttributeDict(a=1, b=AttributeDict(c=[2])),
        "config": OmegaConf.create({"model": {"target": "x", "list": [1, 2]}}),
        "score": np.float64(0.5),
        "namespace": argparse.Namespace(lr=1e-4),
        "counts": defaultdict(int, {"a": 1}),
    }
    file = torch_save(content, tmp_path / "full.ckpt")
    assert torch.equal(read_pickled(file)["state_dict"]["x"], torch.ones(2))
    file = torch_save({"path": PurePosixPath("x")}, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match="PurePosixPath"):
        read_pickled(file)


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    with pytest.raises(UserError, match="program.pt is a TorchScript program, not a checkpoint"):
        load_model(tmp_path / "program.pt")


@pytest.mark.parametrize(
    ("warning", "told"), [("Sparse CSR tensor support is in beta state.", 0), ("A new one\n of torch", 1)]
)
def test_what_torch_warns_of_reaches_the_user_with_the_files_name(tmp_path, monkeypatch, warning, told):
    file = torch_save({"x": torch.zeros(2)}, tmp_path / "a.ckpt")
    monkeypatch.setattr(
        torch, "load", lambda *_, load=torch.load, **more: warnings.warn(warning, stacklevel=1) or load(*_, **more)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_pickled(file)
    assert [str(w.message) for w in caught] == [f"{file}: A new one"] * told


def test_an_archive_with_compressed_entries_is_read_right(tmp_path):
    """Compressed tensors cannot be memory-mapped."""
    tensor = torch.arange(10000.0)
    source = torch_save({"x": tensor}, tmp_path / "stored.ckpt")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert torch.equal(read_pickled(tmp_path / "packed.ckpt")["x"], tensor)


@pytest.fixture(scope="module")
def state():
    return tiny_models.make(tiny_models.small_v1()).state


@pytest.fixture
def yaml(tmp_path):
    return tiny_models.write_yaml(tiny_models.small_v1(), tmp_path / "m.yaml")


KEY = "model.diffusion_model.middle_block.0.in_layers.2.weight"


def with_value(state, value):
    changed = state[KEY].clone()
    changed[3, 1] = value
    return {**state, KEY: changed}


def half_of(file):
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])


def broken_files(state, place):
    """{file: what is said of it}."""

    def saved(content, name):
        save_file(content, place / name)
        return name

    torch.save(state, place / "half.ckpt")
    torch.save(state, place / "half-legacy.ckpt", _use_new_zipfile_serialization=False)
    save_file(state, place / "half.safetensors")
    for name in ("half.ckpt", "half-legacy.ckpt", "half.safetensors"):
        half_of(place / name)
    (place / "empty.ckpt").write_bytes(b"")
    (place / "pointer.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (place / "page.ckpt").write_text("<!DOCTYPE html><html></html>")
    torch.save([1, 2], place / "list.ckpt")
    torch.save({"state_dict": {1: torch.zeros(1)}}, place / "numbers.ckpt")
    torch.save({**state, KEY: torch.zeros(2, 2).to_sparse()}, place / "sparse.ckpt")
    with zipfile.ZipFile(place / "document.ckpt", "w") as archive:
        archive.writestr("content.xml", "<text/>")
    with zipfile.ZipFile(place / "archive.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", "no pickle")
    lora = {f"lora_unet_{i}.lora_down.weight": torch.zeros(1) for i in range(3)}
    sdxl = {"conditioner.embedders.0.transformer.x": torch.zeros(1), KEY: torch.zeros(1)}
    inpainting = {**state, "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}
    return {
        "half.ckpt": "is not a whole checkpoint",
        "half-legacy.ckpt": "is not a whole checkpoint",
        "half.safetensors": "is not a whole .safetensors file",
        "empty.ckpt": "is empty",
        "pointer.ckpt": "is a Git LFS pointer",
        "page.ckpt": "is no checkpoint",
        "list.ckpt": "holds list, expected a state dict",
        "numbers.ckpt": "holds int 1: Tensor in its state dict, expected tensors by their names",
        "sparse.ckpt": f"does not fit: {KEY} is (2, 2)",
        "document.ckpt": "is not a whole checkpoint (an archive, but not one of torch.save)",
        "archive.ckpt": "is not a whole checkpoint (an archive, but not one of torch.save)",
        saved({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4)}, "flat.safetensors"): "lacks ",
        saved({}, "none.safetensors"): "holds no tensors",
        saved(lora, "lora.safetensors"): "is a LoRA",
        saved({"unet.x.to_k.lora_A.weight": torch.zeros(1)}, "peft.safetensors"): "is a LoRA",
        saved(sdxl, "xl.safetensors"): "holds Stable Diffusion XL",
        saved({"down_blocks.0.x": torch.zeros(1)}, "unet.safetensors"): "holds one part of a diffusers folder",
        saved(inpainting, "inpainting.safetensors"): "is a model with 9 input channels",
        saved(
            {**state, KEY: state[KEY].to(torch.float8_e4m3fn)}, "fp8.safetensors"
        ): f"cannot be computed with: {KEY} is float8_e4m3fn",
        saved({**state, KEY: state[KEY].to(torch.int8)}, "int8.safetensors"): f"cannot be computed with: {KEY} is int8",
        saved(with_value(state, float("nan")), "nan.safetensors"): f"holds NaN or infinite values in {KEY}",
        saved(with_value(state, float("inf")), "inf.safetensors"): f"holds NaN or infinite values in {KEY}",
        saved(
            {n: t.half() for n, t in with_value(state, float("nan")).items()}, "nan16.safetensors"
        ): f"holds NaN or infinite values in {KEY}",
        saved({**state, "cond_stage_model.new": torch.zeros(1)}, "extra.safetensors"): "has unknown cond_stage_model.new",
    }


@pytest.mark.slow
def test_broken_and_foreign_files_are_named_in_one_line(state, yaml, tmp_path):
    for name, message in broken_files(state, tmp_path).items():
        with pytest.raises(UserError) as error, warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning would be a second line
            load_model(yaml, tmp_path / name)
        assert message in str(error.value), name
        assert "\n" not in str(error.value), name


@pytest.mark.slow
def test_rows_of_a_token_table_that_do_not_go_with_their_ids(tmp_path):
    rows, ids = torch.zeros(3, 128).half(), torch.tensor([1, 2, 3], dtype=torch.int32)
    for changed in (
        {TOKEN_ROWS: rows},
        {TOKEN_ROWS: rows, TOKEN_IDS: ids[:2]},
        {TOKEN_ROWS: rows, TOKEN_IDS: ids + 49405},
        {TOKEN_ROWS: rows, TOKEN_IDS: ids - 2},
        {TOKEN_ROWS: rows, TOKEN_IDS: ids.float()},
        {TOKEN_ROWS: rows[:0], TOKEN_IDS: ids[:0]},
        {TOKEN_ROWS: rows[:, 0], TOKEN_IDS: ids},
        {TOKEN_ROWS: rows.to(torch.float8_e4m3fn), TOKEN_IDS: ids},
    ):
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, tmp_path / "rows.safetensors")
        with pytest.raises(UserError, match="rows.safetensors cannot be used: .*expected a row"):
            load_model(ROOT / "configs/model/tiny.yaml", tmp_path / "rows.safetensors")
    save_file({TOKEN_ROWS: rows, TOKEN_IDS: ids + 49404}, tmp_path / "rows.safetensors")
    with pytest.raises(UserError, match="rows.safetensors lacks"):  # these do, but there is nothing else
        load_model(ROOT / "configs/model/tiny.yaml", tmp_path / "rows.safetensors")


def test_a_single_component_or_a_small_model_names_what_to_give(state, tmp_path):
    save_file(state, tmp_path / "small.safetensors")
    with pytest.raises(UserError, match="a text context 64 wide, expected 768 .* or 1024 .* as model= and the weights"):
        load_model(tmp_path / "small.safetensors")
    save_file({n: t for n, t in state.items() if n.startswith("first_stage_model.")}, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match="holds no model under Stable Diffusion's names"):
        load_model(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("program", mostly_slow(["txt2img.py", "sample_dci.py", "train_ico.py"], "sample_dci.py"))
def test_programs_refuse_with_one_line_and_exit_code_2(program, tmp_path):
    trace = tmp_path / "trace"
    file = torch_save({"state_dict": Evil(trace)}, tmp_path / "evil.ckpt")
    arguments = {
        "txt2img.py": ["--prompt", "a dog", "--model", str(file)],
        "sample_dci.py": ["--prompt", "a dog", "--concept", str(file), "--model", str(file)],
        "train_ico.py": [
            "--config",
            "configs/train/ico-tiny.yaml",
            f"checkpoint={file}",
            "data.images=data/concepts/cat",
            "concept.class_noun=cat",
        ],
    }[program]
    result = run(program, *arguments)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ") and "evil.ckpt" in result.stderr
    assert not trace.exists()
