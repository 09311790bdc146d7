"""Measure how often the embedded base model generates the noun and the place that a prompt asks for.

python scripts/evaluate_base.py        # 16 images for each of 200 prompts; --prompts, --images for less

Repeating the command goes on where it stopped.
"""

import json
from pathlib import Path

import clone  # noqa: F401

from dci.cli.arguments import Parser, number, positive, run, seed
from dci.cli.loading import TINY, pick_device
from ldm.shipped import ROOT

SHOWN = 256  # prompts on the sheet


def main() -> None:
    """Generate the images that are still missing, classify all of them, and write the figures."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=positive, default=200, help="prompts taken from all pairs (default 200)")
    parser.add_argument("--images", type=positive, default=16, help="images of each prompt (default 16)")
    parser.add_argument("--scale", type=number, default=5.0, help="guidance (default 5)")
    parser.add_argument("--steps", type=positive, default=50, help="DDIM steps (default 50)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is 1.4 times as fast on a CPU")
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--checkpoint", help="weights, in place of the configuration's own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", help="folder that keeps the images, to go on from (default outputs/base/<options>)")
    parser.add_argument("--outdir", default=str(ROOT / "docs"), help="folder of the results (default docs)")
    args = parser.parse_args()

    import torch
    from tqdm import tqdm

    from dci.dual_branch.options import sampling_options
    from dci.evaluation.bootstrap import bootstrap_mean
    from ldm.checkpoint import fingerprint, load_model
    from ldm.embedded_encoders import ENCODERS, load_classifier
    from ldm.pretraining.evaluation import classify, generate_images, held_out_images, labelled_prompts
    from ldm.pretraining.vae import psnr

    model = load_model(args.model, args.checkpoint).to(pick_device(args.device))
    options = sampling_options(model, seed=args.seed, steps=args.steps, scale=args.scale)
    classifier = load_classifier()
    prompts = labelled_prompts(args.prompts, args.seed)
    outdir = Path(args.outdir)
    outdir.mkdir(parents=True, exist_ok=True)

    options_name = f"{args.prompts}x{args.images}-{args.steps}-{args.scale:g}-{args.seed}-{args.precision}"
    cache = Path(args.cache or "outputs/base") / f"{fingerprint(model)[:12]}-{options_name}"
    cache.mkdir(parents=True, exist_ok=True)

    bf16 = torch.autocast(model.device.type, torch.bfloat16, enabled=args.precision == "bf16")
    texts = [prompt.prompt for prompt in prompts]
    with bf16, tqdm(total=len(prompts) * args.images, desc="sampling", unit="image") as bar:
        images = generate_images(model, texts, args.images, options, args.batch_size, bar.update, cache)
    decibels = psnr(model.autoencoder, held_out_images()).tolist()
    given_back = bootstrap_mean(decibels, {"image": [str(number) for number in range(len(decibels))]})
    result = {
        "psnr": round(given_back.mean, 2),
        "psnr_interval": [round(end, 2) for end in (given_back.low, given_back.high)],
    }
    result |= classify(classifier, prompts, images)
    result |= {"images": len(images), "guidance": args.scale, "steps": args.steps, "seed": args.seed}
    result["precision"] = args.precision
    result["classifier_on_rendered_images"] = json.loads((ENCODERS / "accuracy.json").read_text())["classifier"]
    write(outdir, result, prompts, images, args.images)


def write(outdir: Path, result: dict, prompts: list, images, each: int) -> None:
    """Write base-evaluation.json, .md and .png: the first image of up to SHOWN prompts, wrong ones marked."""
    import numpy as np
    from PIL import Image

    from ldm.images import captioned_grid

    named = result.pop("named")
    firsts = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[::each]]
    captions = [q.prompt if q.noun == n else f"{q.prompt} [{n}]" for q, n in zip(prompts, named, strict=True)]
    shown = sorted(np.random.default_rng(0).permutation(len(prompts))[:SHOWN])
    sheet = captioned_grid([firsts[i] for i in shown], [captions[i] for i in shown], columns=10, scale=2)
    sheet.quantize(256).save(outdir / "base-evaluation.png", optimize=True)  # a third of the size
    (outdir / "base-evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    (outdir / "base-evaluation.md").write_text(report(result, len(prompts)))
    print(report(result, len(prompts)))
    print(f"Written: {outdir}/base-evaluation.json, .md, .png")


def report(result: dict, prompts: int) -> str:
    """Return the figures as Markdown."""
    own, (low, high) = result["classifier_on_rendered_images"], result["psnr_interval"]
    each = result["images"] // prompts
    lines = [
        "# The base model, evaluated",
        "",
        "```bash",
        f"python scripts/evaluate_base.py --prompts {prompts} --images {each} --scale {result['guidance']:g} "
        f"--steps {result['steps']} --seed {result['seed']} --precision {result['precision']}",
        "```",
        "",
        f'{result["images"]} images of {prompts} prompts "a <noun> <place>" generated with seed {result["seed"]};',
        f"guidance {result['guidance']:g}, {result['steps']} DDIM steps, {result['precision']}. Scored by the classifier of",
        f"`data/tiny/encoders`, which on rendered images is right about {own['place']:.1%} of places",
        f"and {own['noun']:.1%} of nouns.",
        "",
        "| | right | 95 % interval |",
        "|---|---|---|",
        *(_share(name, result[f"{name}_right"], prompts) for name in ("place", "noun", "both")),
        "",
        f"Wilson's intervals, of {prompts} independent prompts.",
        "",
        f"The autoencoder gives 256 held-out images back with {result['psnr']:.1f} dB [{low:.1f}, {high:.1f}] (mean PSNR, "
        "bootstrap interval).",
        "",
        f"The first image of {'every prompt' if prompts <= SHOWN else f'{SHOWN} prompts drawn at random'}; in brackets what "
        "the classifier took a wrong noun for:",
        "",
        f"![{min(prompts, SHOWN)} prompts](base-evaluation.png)",
    ]
    for name in ("noun", "place"):
        lines += ["", f"Right {name}, the worst first: {_worst_first(result[f'{name}_right_by_{name}'], prompts)}."]
    return "\n".join(lines) + "\n"


def _worst_first(shares: dict[str, float], prompts: int) -> str:
    """Each share with its interval, and those that are always right together."""
    each = prompts // len(shares)  # prompts of each noun or place
    some = sorted((item for item in shares.items() if item[1] < 1), key=lambda item: item[1])
    listed = [f"{key} {share:.0%} [{low:.0%}, {high:.0%}]" for key, share in some for low, high in (wilson(share, each),)]
    return "; ".join(
        [*listed, f"{'the other' if some else 'all'} {len(shares) - len(some)} 100% [{wilson(1, each)[0]:.0%}, 100%]"]
    )


def _share(name: str, share: float, number: int) -> str:
    low, high = wilson(share, number)
    return f"| {name} | {share:.1%} | [{low:.1%}, {high:.1%}] |"


def wilson(share: float, number: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the interval of a share of independent cases (Wilson 1927), which keeps a width where all are right."""
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * (share * (1 - share) / number + z * z / (4 * number**2)) ** 0.5
    return middle - half, middle + half


if __name__ == "__main__":
    run(main)
