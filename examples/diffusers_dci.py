"""DCI in a pipeline of diffusers, on the embedded model; about a minute on two cores.

python examples/diffusers_dci.py                                   # learns a concept shortly, then samples with it
python examples/diffusers_dci.py --concept logs/RUN/concept.safetensors --prompt "a V* cat in the snow"
"""

import argparse
import tempfile
from pathlib import Path

import clone  # noqa: F401
import torch
from PIL import Image

from dci.diffusers import DCIPipeline
from ldm.checkpoint import load_model
from ldm.errors import reported_in_one_line
from ldm.formats.diffusers_export import write_folder
from ldm.images import grid
from ldm.shipped import ROOT

TINY = ROOT / "configs/model/tiny.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concept", type=Path, help="a concept of the embedded model (default: learn data/concepts/cat)")
    parser.add_argument("--prompt", default="a V* cat on the beach", help="names the concept V*")
    parser.add_argument("--train-steps", type=int, default=80, help="of learning the concept (default 80)")
    parser.add_argument("--out", type=Path, default=Path("diffusers_dci.png"), help="above without DCI, below with it")
    args = parser.parse_args()

    from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler  # here: a missing package is reported in one line

    with tempfile.TemporaryDirectory() as folder:
        concept = args.concept or learned(args.train_steps, Path(folder) / "run")
        model = load_model(TINY)
        write_folder(model.state_dict(), model.config, Path(folder) / "tiny")

        # From here on it is what one writes for any Stable Diffusion of diffusers.
        pipe = StableDiffusionPipeline.from_pretrained(Path(folder) / "tiny")
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
        pipe = DCIPipeline.from_pipe(pipe)
        pipe.load_concept(concept)

    def images(**options: float | bool) -> list[Image.Image]:
        settings = {"num_inference_steps": 20, "guidance_scale": 6.0, "num_images_per_prompt": 4}
        return pipe(args.prompt, generator=torch.Generator().manual_seed(0), **settings, **options).images

    grid([*images(dci=False), *images(agg_time=0.3)], columns=4).save(args.out)
    print(f"Images: {args.out}, above without DCI, below with it")


def learned(steps: int, logdir: Path) -> Path:
    """Learn the demo concept with ICO and return its file."""
    from dci.finetuning.config_files import finetune_config
    from dci.finetuning.trainer import finetune

    config = finetune_config(ROOT / "configs/train/ico-tiny.yaml", [f"training.steps={steps}", "validation.every=0"])
    return finetune(load_model(TINY), config, logdir) / "concept.safetensors"


if __name__ == "__main__":
    with reported_in_one_line():
        main()
