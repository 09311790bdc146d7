"""Where the sampling programs put their pictures, and how they draw many."""

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from common import UserError


def sampling_facts(args: argparse.Namespace, base: str, checkpoint: str | None, canvas, options) -> dict:
    """Return everything needed to make pictures again but their prompts and indices, and a concept's facts."""
    return {
        "negative_prompt": args.negative_prompt,
        "model": base,
        "checkpoint": checkpoint,
        "ema": args.ema,
        "clip_skip": args.clip_skip,
        "precision": args.precision,
        "init_image": args.init_image,
        "mask": args.mask,
        "strength": canvas and canvas.strength,
        **dataclasses.asdict(options),
    }


def draw(
    args: argparse.Namespace,
    prompts: list,
    calls: int,
    sample: Callable,
    facts: Callable,
    saved: Callable | None = None,
) -> None:
    """Draw every prompt's pictures, `--batch-size` at a time, under a progress bar; each prompt's are saved at once.

    Args:
        prompts: whatever `sample` and `facts` understand.
        calls: solver steps of a picture.
        sample: (prompt, picture indices, callback for each step) -> pixels (b, 3, h, w).
        facts: prompt -> everything needed to make its pictures again, but their indices.
        saved: told (folder, names of the pictures in it) after each prompt.
    """
    from tqdm import tqdm

    from ldm.images import to_pictures

    total = args.n_samples * args.n_iter
    starts = range(0, total, args.batch_size)
    outdir = open_outdir(args)
    with tqdm(total=len(prompts) * len(starts) * calls, desc="sampling", unit="step") as progress:
        for prompt in prompts:
            pictures = []
            for start in starts:
                indices = list(range(start, min(start + args.batch_size, total)))
                pictures += to_pictures(sample(prompt, indices, lambda _: progress.update()))
            sheet = save_pictures(outdir, pictures, facts(prompt))
            if saved is not None:
                saved(outdir, sorted(file.stem for file in (outdir / "samples").glob("*.png"))[-total:])
    print(f"Pictures: {outdir / 'samples'}\nGrid: {sheet}")


def open_outdir(args: argparse.Namespace) -> Path:
    """Return the folder for the pictures; before drawing, so that nothing drawn is lost.

    Raises:
        UserError: pictures cannot be added there.
    """
    outdir = Path(args.outdir) if args.outdir else _new_outdir(args.prompt or Path(args.from_file).stem)
    if outdir.exists() and not outdir.is_dir():
        raise UserError(f"--outdir {outdir} is a file: give a folder")
    _read_record(outdir)
    return outdir


def save_pictures(outdir: Path, pictures: list, facts: dict) -> Path:
    """Write samples/NNNNN.png, a grid of them, and prompts.json; earlier pictures are kept.

    Each picture carries its facts in the text chunk `parameters`, as WebUI writes and reads it.

    Args:
        facts: with the picture's index added, everything needed to make a picture again.

    Returns:
        The grid's file.
    """
    from PIL.PngImagePlugin import PngInfo

    from ldm.images import grid

    samples = outdir / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    first = 1 + max((int(f.stem) for f in samples.glob("*.png") if f.stem.isdigit()), default=-1)
    record = _read_record(outdir)
    for index, picture in enumerate(pictures):
        stem = f"{first + index:05}"
        record[stem] = facts | {"index": index}
        info = PngInfo()
        info.add_itxt("parameters", parameters_text(record[stem]))
        picture.save(samples / f"{stem}.png", pnginfo=info)
    (outdir / "prompts.json").write_text(json.dumps(record, indent=2))
    sheet = outdir / (f"grid-{first:05}.png" if first else "grid.png")
    grid(pictures).save(sheet)
    return sheet


_SAMPLERS = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m-karras": "DPM++ 2M Karras",
    "euler": "Euler",
    "euler-a": "Euler a",
}
"""What WebUI calls the solvers."""

_NAMES = {"scale": "CFG scale", "model": "Model", "strength": "Denoising strength", "eta": "Eta", "ema": "EMA"}


def parameters_text(facts: dict) -> str:
    """Return a picture's facts as WebUI words them: the prompt, the negative prompt, a line of `Name: value`."""
    entries = {"Steps": facts["steps"], "Sampler": _SAMPLERS[facts["solver"]], "CFG scale": facts["scale"]}
    entries |= {"Seed": facts["seed"], "Size": f"{facts['width']}x{facts['height']}"}
    said = {"prompt", "negative_prompt", "steps", "solver", "scale", "seed", "width", "height"}
    for name, value in facts.items():
        if name in said or value in (None, False, ""):
            continue
        values = {f"{name} {key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
        entries |= {_NAMES.get(key, key.replace("_", " ").capitalize()): entry for key, entry in values.items()}
    lines = [facts["prompt"]]
    if facts.get("negative_prompt"):
        lines.append(f"Negative prompt: {facts['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in entries.items()))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text


def _read_record(outdir: Path) -> dict:
    record = outdir / "prompts.json"
    try:
        return json.loads(record.read_text()) if record.is_file() else {}
    except ValueError as error:
        raise UserError(f"{record} is not readable as JSON: mend it, or give another --outdir") from error


def _new_outdir(prompt: str) -> Path:
    """Return a folder in outputs/ named after the time and the prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
    return Path("outputs") / f"{datetime.now():%Y-%m-%dT%H-%M-%S}_{words}"
