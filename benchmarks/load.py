"""Loading: time and peak memory of processes that load one model, ours and diffusers' in alternation.

Each load is a process of its own: memory that was once touched stays with a process, and so do open files.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import peers
from benchmarks.measure import summary
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError


def measure(args: argparse.Namespace) -> list[dict]:
    """Load random weights of the model's size from each usual format, or from a diffusers folder beside diffusers."""
    if args.peer == "pipeline":
        raise UserError("load --peer pipeline: a pipeline is measured by sample; give --peer none or --peer diffusers")
    if args.peer == "naive":
        raise UserError("load --peer naive: attention has no part in loading; give --peer none or --peer diffusers")
    if args.compile or args.device != "cpu":
        raise UserError("load measures loading into main memory: give --device cpu, and leave --compile out")
    model = peers.build(args.model, getattr(torch, args.dtype), "cpu")
    with tempfile.TemporaryDirectory() as name:
        files = _save(model, args, Path(name))
        del model
        libraries = ["ours"] if args.peer == "none" else ["ours", "diffusers"]
        return [_measure_file(format_, file, libraries, args) for format_, file in files.items()]


def _save(model: LatentDiffusion, args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Write the model's files: {format: path}."""
    if args.peer == "diffusers":
        theirs = peers.with_weights_of(model)
        for part, network in (("unet", theirs.unet), ("vae", theirs.vae), ("text_encoder", theirs.text)):
            network.save_pretrained(folder / part)
        peers.diffusers_scheduler().save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        return {"diffusers folder": folder}
    if args.model == "tiny":  # whose architecture does not follow from the weights alone
        return {"YAML and .safetensors": peers.ROOT / "configs/model/tiny.yaml"}
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    torch.save({"state_dict": state}, folder / "model.ckpt")
    return {".safetensors": folder / "model.safetensors", ".ckpt": folder / "model.ckpt"}


def _measure_file(name: str, file: Path, libraries: list[str], args: argparse.Namespace) -> dict:
    """Load a file in new processes, in alternation; a first round brings it into the system's cache."""
    runs = {library: [] for library in libraries}
    for round_ in range(args.rounds + 1):
        for library in libraries:
            command = [sys.executable, str(peers.ROOT / "benchmarks/measure_load.py"), str(file), args.precision, library]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
            if round_:
                runs[library].append(json.loads(done.stdout))
    ways = {library: _summary(results) for library, results in runs.items()}
    ratios = {}
    for library in libraries[1:]:
        pairs = [a["seconds"] / b["seconds"] for a, b in zip(runs["ours"], runs[library], strict=True)]
        ratios[library] = {**summary(pairs), "memory": ways["ours"]["peak_bytes"] / ways[library]["peak_bytes"]}
    return {"name": f"loading, {name}", "clock": "perf_counter", "ways": ways, "ratios": ratios}


def _summary(runs: list[dict]) -> dict:
    return {**summary([run["seconds"] for run in runs]), "peak_bytes": max(run["peak_bytes"] for run in runs)}
