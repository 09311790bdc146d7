"""Sample fine-tuned concepts in every place of the toy world, and count the places that are still obeyed.

python scripts/sheet_places.py --concept EARLY.safetensors --concept LATE.safetensors --out docs/overfitting
"""

import json
from pathlib import Path

import clone  # noqa: F401

from dci.cli.arguments import Parser, add_model_options, number, positive, run, seed
from dci.cli.loading import base_model, base_vae, pick_device


def main() -> None:
    """Sample each concept in every place, classify the images, and write sheet and figures."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--concept", required=True, action="append", help="a concept file; repeat it to compare several")
    parser.add_argument("--prompt", default="a V* {noun} {place}", help="with V*, {noun} and {place}")
    parser.add_argument("--dci", action="store_true", help="with DCI (default: plain sampling)")
    parser.add_argument("--out", required=True, help="stem of the sheet (.png) and the figures (.json)")
    parser.add_argument("--n-samples", type=positive, default=4, help="images of each place (default 4)")
    parser.add_argument("--steps", type=positive, help="solver steps (default: the model's)")
    parser.add_argument("--scale", type=number, help="classifier-free guidance (default: the model's)")
    parser.add_argument("--seed", type=seed, default=0, help="same seed, same images (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add_model_options(parser)
    args = parser.parse_args()

    results, images, captions = {}, [], []
    for file in args.concept:
        generated, result = evaluate_places(args, file)
        results[file] = result
        images += [row[0] for row in generated.values()]
        captions += list(generated)
        print(
            f"{file}: place right {result['place_right']:.1%} of {result['images']} images, "
            f"likeness to the references {result['likeness']:.3f}; " + json.dumps(result["seen"])
        )

    from ldm.images import captioned_grid

    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    captioned_grid(images, captions, columns=len(captions) // len(args.concept), scale=1).save(out.with_suffix(".png"))
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"Sheet: {out.with_suffix('.png')}, a row for each concept file\nFigures: {out.with_suffix('.json')}")


def evaluate_places(args, file: str) -> tuple[dict, dict]:
    """Return the images of every place, and what the classifier sees in them."""
    import torch
    from tqdm import tqdm

    from dci.concept.concept_file import Concept
    from dci.concept.prompts import parse_prompt
    from dci.dual_branch.options import dual_branch, sampling_options
    from dci.dual_branch.sampling import SampleRequest, sample
    from dci.evaluation.bootstrap import bootstrap_mean
    from ldm.checkpoint import load_model
    from ldm.embedded_encoders import SIZE, load_classifier, load_instance_encoder
    from ldm.images import list_images, read_image, square, to_images, to_tensor
    from ldm.pretraining.scenes import PLACES

    concept = Concept.load(file)
    vae = base_vae(args, concept.trained_on)
    model = load_model(*base_model(args, concept.trained_on), ema=args.ema, clip_skip=args.clip_skip, vae=vae)
    concept.apply(model)
    model.to(pick_device(args.device))
    options = sampling_options(model, steps=args.steps, scale=args.scale, seed=args.seed)
    dual = dual_branch(model) if args.dci else None
    classifier, instance = load_classifier(), load_instance_encoder()
    generated, seen, likeness = {}, {}, {}
    folder = concept.config["data"]["images"]
    images = torch.stack([to_tensor(square(read_image(file), SIZE)) for file in list_images(folder)])
    with torch.inference_mode():
        references = instance.image_features(images)
    for place, (_, phrases) in tqdm(PLACES.items(), "places"):
        text = args.prompt.replace("{noun}", concept.class_noun).replace("{place}", phrases[0])
        prompt = parse_prompt(text, concept.names)
        pixels = sample(model, concept, SampleRequest(prompt, list(range(args.n_samples)), options, dual)).clamp(-1, 1).cpu()
        with torch.inference_mode():
            likeness[place] = float((instance.image_features(pixels) @ references.T).mean())
            answers = [classifier.places[i] for i in classifier.logits(pixels)[1].argmax(-1)]
        generated[phrases[0]] = to_images(pixels)
        seen[place] = {name: answers.count(name) / len(answers) for name in sorted(set(answers))}
    right = sum(shares.get(place, 0) for place, shares in seen.items()) / len(seen)
    like = bootstrap_mean(list(likeness.values()), {"place": list(likeness)})
    figures = {"place_right": right, "likeness": like.mean, "likeness_interval": [like.low, like.high]}
    return generated, figures | {"images": len(seen) * args.n_samples, "seen": seen}


if __name__ == "__main__":
    run(main)
