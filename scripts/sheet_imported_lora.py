"""Train a LoRA with peft on diffusers' form of the embedded model, import it, and sample it with DCI and without.

python scripts/sheet_imported_lora.py --images data/concepts/cat --class-noun cat --out docs/imported-lora.png
"""

import tempfile
from pathlib import Path

import clone  # noqa: F401

from dci.cli.arguments import Parser, image_file, number, positive, run
from ldm.shipped import ROOT

MODEL = ROOT / "configs/model/tiny.yaml"
PLACES = ("on the beach", "in the snow", "in the forest", "at night")
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def main() -> None:
    """Train the LoRA unless it is there, import it, and save the images of both ways to sample."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder of images of the concept")
    parser.add_argument("--class-noun", required=True, help="the ordinary word for it")
    parser.add_argument("--trigger", default="sks", help="the word that stands for it (default sks)")
    parser.add_argument("--rank", type=positive, default=8, help="of the LoRA (default 8)")
    parser.add_argument("--steps", type=positive, default=300, help="training steps (default 300)")
    parser.add_argument("--rate", type=number, default=1e-3, help="learning rate (default 1e-3)")
    parser.add_argument("--agg-time", type=number, help="T_a of DCI (default: the model's)")
    parser.add_argument("--lora", metavar="FOLDER", help="where the LoRA is kept; one that is there is not trained again")
    parser.add_argument("--out", type=image_file, required=True, help="the sheet (.png)")
    args = parser.parse_args()

    from dci import Pipeline
    from ldm.images import captioned_grid

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.lora or temporary)
        if not list(folder.glob("*.safetensors")):
            train_lora(args, folder)
        pipeline = Pipeline.load(
            next(folder.glob("*.safetensors")), MODEL, device="cpu", class_noun=args.class_noun, trigger=args.trigger
        )
    images, captions = [], []
    for place in PLACES:
        prompt = f"a {args.trigger} {args.class_noun} {place}"
        settings = {} if args.agg_time is None else {"agg_time": args.agg_time}
        images += pipeline(prompt, n=2, dci=False) + pipeline(prompt, n=2, **settings)
        captions += [place, "LoRA alone", place, "LoRA and DCI"]
    captioned_grid(images, captions, columns=4, scale=2).save(args.out)
    print(f"Sheet: {args.out}")


def train_lora(args, folder: Path) -> None:
    """Train a LoRA of the UNet on the images under one prompt, and save it as diffusers does."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict
    from tqdm import trange

    from ldm.checkpoint import load_model
    from ldm.formats.diffusers_export import write_folder
    from ldm.images import list_images, read_image, square, to_tensor
    from ldm.schedule import q_sample

    torch.manual_seed(0)
    model = load_model(MODEL)
    with tempfile.TemporaryDirectory() as base:
        write_folder(model.state_dict(), model.config, Path(base))
        unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS, init_lora_weights="gaussian"))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.rate)
    files = list_images(args.images)
    images = torch.stack([to_tensor(square(read_image(file), model.config.image_size)) for file in files])
    with torch.no_grad():
        latents = model.encode(images)
        text = model.text_encoder([f"a photo of a {args.trigger} {args.class_noun}"])
    for _ in trange(args.steps, desc="LoRA", mininterval=10):
        x_0 = latents[torch.randint(len(latents), (4,))]
        noise, t = torch.randn_like(x_0), torch.randint(1000, (len(x_0),))
        output = unet(q_sample(x_0, noise, model.alphas_cumprod[t]), t, text.expand(len(x_0), -1, -1)).sample
        torch.nn.functional.mse_loss(output, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, layers)


if __name__ == "__main__":
    run(main)
