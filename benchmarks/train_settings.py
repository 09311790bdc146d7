"""Steps per second, peak memory and FLOPs of fine-tuning, setting by setting.

python benchmarks/train_settings.py --batch 8 --steps 10        # the table of docs/fine-tuning.md, a process for each line
python benchmarks/train_settings.py --model sd-v1 --size 256    # Stable Diffusion's size with random weights
python benchmarks/train_settings.py --model sd-v1 --size 512 --only "training.precision=bf16" --flops

With OMP_NUM_THREADS=1 the time is the processor's. Weights are random where a model has none to load:
speed, memory and FLOPs do not depend on them.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SETTINGS = (
    "",
    "training.channels_last=true",
    "training.precision=bf16",
    "training.precision=bf16 training.channels_last=true",
    "training.precision=bf16 training.gradient_checkpointing=true",
    "training.precision=bf16 training.trainable=none",
    "training.precision=bf16 training.trainable=crossattn",
    "training.precision=bf16 training.compile=true",
    "training.precision=bf16 data.cache_latents=false",
    "training.precision=fp16",
)
FULL_SIZE = (
    "",
    "training.precision=bf16",
    "training.precision=bf16 training.gradient_checkpointing=true",
    "training.precision=bf16 training.channels_last=true",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", choices=("tiny", "sd-v1"))
    parser.add_argument("--size", type=int, help="side of the images (default: the model's)")
    parser.add_argument("--batch", type=int, default=2, help="reference images of a step (default 2)")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, after one to warm up (default 3)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file for what was measured (default: the table alone)")
    parser.add_argument("--only", help="this setting alone, in this process; prints JSON")
    parser.add_argument("--flops", action="store_true", help="count the FLOPs of a step (with --only)")
    args = parser.parse_args()
    if args.only is not None:
        print(json.dumps(measure(args), indent=2))
        return
    from benchmarks.report import environment

    print("| setting | steps / s, of the slowest and the fastest step | peak memory |\n|---|---|---|")
    measured = []
    for setting in SETTINGS if args.model == "tiny" else FULL_SIZE:
        command = [
            sys.executable,
            __file__,
            "--only",
            setting,
            "--model",
            args.model,
            "--batch",
            str(args.batch),
            "--steps",
            str(args.steps),
            "--device",
            args.device,
        ]
        done = subprocess.run([*command, *(["--size", str(args.size)] if args.size else [])], capture_output=True, text=True)
        if done.returncode:
            print(f"| {setting} | {done.stderr.strip().splitlines()[-1]} | |", flush=True)
            continue
        result = json.loads(done.stdout)
        measured.append(result)
        slowest, fastest = (1 / side(result["seconds"]) for side in (max, min))
        speed = f"{result['steps_per_second']:.2f} [{slowest:.2f}, {fastest:.2f}]"
        print(f"| {setting or 'fp32'} | {speed} | {result['peak_gib']:.2f} GiB |", flush=True)
    if args.out:
        args.out.write_text(
            json.dumps({"environment": environment(args.device), "measurements": measured}, indent=1) + "\n",
            encoding="utf-8",
        )


def measure(args: argparse.Namespace) -> dict:
    """Time optimizer steps of one setting."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.measure import PACKED

    module, parts, context = prepare(args)
    optimizer = module.configure_optimizers()

    def step() -> None:
        with context():
            loss = module.loss(parts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device != "cpu":
            torch.cuda.synchronize()

    result = {"setting": args.only, "model": args.model, "size": module.model.config.image_size, "batch": args.batch}
    if args.flops:
        with FlopCounterMode(display=False, custom_mapping=PACKED) as counter:
            step()
        result["flops_per_image"] = counter.get_total_flops() / args.batch
        counts = counter.get_flop_counts()
        result["flops_autoencoder"] = sum(sum(v.values()) for k, v in counts.items() if "first_stage" in k)
    if args.steps:
        step()
    seconds = []
    # On one thread a busy machine changes the time on the clock, but hardly that of the processor.
    clock = time.process_time if args.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(args.steps):
        start = clock()
        step()
        seconds.append(clock() - start)
    on_cpu = args.device == "cpu"
    import resource  # Windows has none

    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if on_cpu else torch.cuda.max_memory_allocated()
    return result | {
        "steps_per_second": len(seconds) / sum(seconds) if seconds else None,
        "seconds": seconds,
        "clock": clock.__name__,
        "peak_gib": peak / 2**30,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
    }


def prepare(args: argparse.Namespace):
    """Return a module ready to train, a batch, and the precision's context."""
    import contextlib
    import functools

    import torch

    from dci.finetuning.config import FinetuneConfig
    from dci.finetuning.dataset import BatchSlot, ConceptDataset
    from dci.finetuning.images import read_references
    from dci.finetuning.module import ICOTraining
    from dci.finetuning.precision import check_device, lightning_name
    from ldm import config as configuration
    from ldm.checkpoint import load_model
    from ldm.config import ModelConfig
    from ldm.diffusion import LatentDiffusion

    torch.manual_seed(0)
    required = ["concept.class_noun=cat", f"data.images={ROOT / 'data/concepts/cat'}", *args.only.split()]
    config = configuration.build(FinetuneConfig, {}, required)
    if args.model == "tiny":
        model = load_model(ROOT / "configs/model/tiny.yaml").to(args.device)
    else:
        with torch.device(args.device):
            model = LatentDiffusion(configuration.load(ModelConfig, ROOT / "configs/model/sd-v1.yaml"))
        model.to(args.device).eval()
    model.config.image_size = args.size or model.config.image_size
    check_device(config.training.precision, model.device)
    images = read_references(config.data.images, config.data, model.config.image_size)
    module = ICOTraining(model, config, len(images)).to(args.device)
    dataset = ConceptDataset(model, images[: args.batch], [], config.data)
    parts = dataset.__getitems__([[BatchSlot(i % len(dataset), 0, i) for i in range(args.batch)]])[0].to(args.device)
    module.prepare()
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(lightning_name(config.training.precision))
    autocast = functools.partial(torch.autocast, torch.device(args.device).type, dtype)
    return module, parts, autocast if dtype else contextlib.nullcontext


if __name__ == "__main__":
    main()
