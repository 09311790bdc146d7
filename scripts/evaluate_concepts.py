"""Teach the embedded model each held-out drawing, and count how often it then generates that one of them, in every place.

python scripts/evaluate_concepts.py                         # 15 drawings with ICO and Custom Diffusion; hours on a CPU
python scripts/evaluate_concepts.py --concepts teddy,boot --methods ico-tiny

Each drawing is learned from five images in one place (data/concepts) and generated in the world's 16 places. The
instance encoder picks, of all the drawings' reference images, the nearest: right if it is the drawing that
was taught. Repeating the command goes on where it stopped.
"""

import json
from pathlib import Path

import clone  # noqa: F401

from dci.cli.arguments import Parser, add_model_options, number, positive, run, seed
from dci.cli.loading import base_model, pick_device
from ldm.shipped import ROOT

METHODS = "ico-tiny,custom-diffusion-tiny"


def main() -> None:
    """Train and sample each drawing with each method, and write sheets and figures."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", help="names with commas between them (default: all held-out drawings)")
    parser.add_argument("--methods", default=METHODS, help=f"files of configs/train, without .yaml (default {METHODS})")
    parser.add_argument("--dci", action="store_true", help="with DCI (default: plain sampling)")
    parser.add_argument("--n-samples", type=positive, default=1, help="images of each place (default 1)")
    parser.add_argument("--steps", type=positive, default=50, help="solver steps (default 50)")
    parser.add_argument("--scale", type=number, help="classifier-free guidance (default: the model's)")
    parser.add_argument("--seed", type=seed, default=0, help="same seed, same images (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--work", default="outputs/concepts", help="folder that keeps runs and images, to go on from")
    parser.add_argument("--out", default=str(ROOT / "docs/concepts"), help="stem of the sheets and figures")
    add_model_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of training in place of the files'")
    args = parser.parse_args()

    from tqdm import tqdm

    from ldm.errors import UserError
    from ldm.pretraining.concepts import STUDY_CONCEPTS

    names = args.concepts.split(",") if args.concepts else list(STUDY_CONCEPTS)
    for name in names:
        if name not in STUDY_CONCEPTS:
            raise UserError(f"unknown concept '{name}': expected one of {', '.join(STUDY_CONCEPTS)}")
    gallery = reference_features(list(STUDY_CONCEPTS))
    results: dict[str, dict] = {}
    for method in args.methods.split(","):
        generated = {}
        for name in tqdm(names, method):
            generated[name] = taught(args, method, name, STUDY_CONCEPTS[name].noun)
            results.setdefault(method, {})[name] = recognised(generated[name], name, gallery)
        write_sheet(generated, Path(f"{args.out}-{method}.png"))
    write_figures(args, results)


def taught(args, method: str, name: str, noun: str):
    """Return the images (places * n_samples, 3, h, w) uint8 of a concept, taught by a method; kept in `args.work`."""
    import hashlib

    import torch
    from safetensors.torch import load_file, save_file

    from ldm.checkpoint import fingerprint, load_model
    from ldm.pretraining.scenes import PLACES

    model = load_model(*base_model(args), ema=args.ema, clip_skip=args.clip_skip)
    training = training_config(args, method, name, noun)
    recipe = [fingerprint(model), repr(training), args.dci, args.n_samples, args.steps, args.scale, args.seed]
    folder = Path(args.work) / f"{method}-{name}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]}"
    file = folder / "images.safetensors"
    if not file.is_file():
        concept = learned(args, model, training, folder)
        phrases = [phrases[0] for _, phrases in PLACES.values()]
        prompts = [f"a V* {noun} {phrase}" for phrase in phrases for _ in range(args.n_samples)]
        images = sampled(args, concept, prompts)
        partial = file.with_suffix(".partial")
        save_file({"images": ((images + 1) * 127.5).round().to(torch.uint8)}, partial)
        partial.rename(file)
    return load_file(file)["images"]


def training_config(args, method: str, name: str, noun: str):
    """Return how a method learns a concept: its own file, the concept's images, no validation."""
    from dci.finetuning.config_files import finetune_config

    given = [f"data.images={ROOT / 'data/concepts' / name}", f"concept.class_noun={noun}", "validation.every=0"]
    given += [f"{key}={value}" for key in ("model", "checkpoint") if (value := getattr(args, key))]
    given += ["logging.tensorboard=false", "training.checkpoint_every=null", *args.overrides]
    return finetune_config(ROOT / "configs/train" / f"{method}.yaml", given, name)


def learned(args, model, training, folder: Path) -> Path:
    """Return the concept file of a run in `folder`; a finished run is taken as it is."""
    from dci.finetuning.run_folder import CONCEPT_FILE
    from dci.finetuning.trainer import finetune

    done = sorted(folder.glob(f"*/{CONCEPT_FILE}"))
    return done[-1] if done else finetune(model.to(pick_device(args.device)), training, folder) / CONCEPT_FILE


def sampled(args, concept_file: Path, prompts: list[str]):
    """Return one image (n, 3, h, w) in [-1, 1] for each prompt, its number choosing its noise."""
    from dci.concept.concept_file import Concept
    from dci.concept.prompts import parse_prompt
    from dci.dual_branch.options import dual_branch, sampling_options
    from dci.dual_branch.sampling import SampleRequest, sample
    from ldm.checkpoint import load_model

    concept = Concept.load(concept_file)
    model = load_model(*base_model(args, concept.trained_on), ema=args.ema, clip_skip=args.clip_skip)
    concept.apply(model)
    model.to(pick_device(args.device))
    options = sampling_options(model, steps=args.steps, scale=args.scale, seed=args.seed)
    parsed = [parse_prompt(prompt, concept.names) for prompt in prompts]
    dual = dual_branch(model) if args.dci else None
    request = SampleRequest(parsed, list(range(len(prompts))), options, dual)
    return sample(model, concept, request).clamp(-1, 1).cpu()


def reference_features(names: list[str]) -> dict:
    """Return the instance encoder's features (5, d) of every concept's reference images."""
    import torch

    from ldm.embedded_encoders import SIZE, load_instance_encoder
    from ldm.images import list_images, read_image, square, to_tensor

    encoder, features = load_instance_encoder(), {}
    for name in names:
        files = list_images(ROOT / "data/concepts" / name)
        with torch.inference_mode():
            features[name] = encoder.image_features(torch.stack([to_tensor(square(read_image(f), SIZE)) for f in files]))
    return features


def recognised(images, name: str, gallery: dict) -> dict[str, float | int]:
    """Return how often a concept's images (n, 3, h, w) uint8 are taken for it, like it, and in the place asked for."""
    import torch

    from ldm.embedded_encoders import load_classifier, load_instance_encoder
    from ldm.pretraining.scenes import PLACES

    x = images.float() / 127.5 - 1
    classifier = load_classifier()
    with torch.inference_mode():
        features = load_instance_encoder().image_features(x)
        places = classifier.logits(x)[1].argmax(-1)
    likeness = torch.stack([(features @ references.T).mean(-1) for references in gallery.values()], dim=-1)
    own = list(gallery).index(name)
    asked = torch.tensor([classifier.places.index(place) for place in PLACES for _ in range(len(x) // len(PLACES))])
    return {
        "right_drawing": (likeness.argmax(-1) == own).float().mean().item(),
        "place_right": (places == asked).float().mean().item(),
        "likeness": likeness[:, own].mean().item(),
        "images": len(x),
    }


def write_sheet(generated: dict, out: Path) -> None:
    """Write a sheet: a row for each concept, two of its references and then the first image of every place."""
    from ldm.images import captioned_grid, list_images, read_image, square, to_images
    from ldm.pretraining.scenes import PLACES

    images, captions = [], []
    for name, rows in generated.items():
        references = [square(read_image(file), 64) for file in list_images(ROOT / "data/concepts" / name)[:2]]
        firsts = rows[:: len(rows) // len(PLACES)]
        images += [*references, *to_images(firsts.float() / 127.5 - 1)]
        captions += [name, "reference", *PLACES]
    out.parent.mkdir(parents=True, exist_ok=True)
    captioned_grid(images, captions, columns=len(PLACES) + 2, scale=1).quantize(256).save(out, optimize=True)
    print(f"Sheet: {out}")


def write_figures(args, results: dict[str, dict]) -> None:
    """Write the figures of every method and concept, and their means, as JSON; print them as a table."""
    from ldm.embedded_encoders import ENCODERS

    means = {
        method: {key: sum(r[key] for r in rows.values()) / len(rows) for key in ("right_drawing", "place_right", "likeness")}
        for method, rows in results.items()
    }
    encoder = json.loads((ENCODERS / "accuracy.json").read_text())["instance"]["of_100"]
    content = {"means": means, "concepts": results, "dci": args.dci, "steps": args.steps, "seed": args.seed}
    content |= {"training": args.overrides, "instance_encoder_right_of_100": encoder}
    out = Path(f"{args.out}.json")
    out.write_text(json.dumps(content, indent=1) + "\n")
    print("| method | concepts | right drawing of 15 | place right | likeness |\n|---|---|---|---|---|")
    for method, mean in means.items():
        shares = f"{mean['right_drawing']:.1%} | {mean['place_right']:.1%} | {mean['likeness']:.3f}"
        print(f"| {method} | {len(results[method])} | {shares} |")
    print(f"Figures: {out}")


if __name__ == "__main__":
    run(main)
