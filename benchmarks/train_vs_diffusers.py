"""Time a Custom Diffusion step of ours against diffusers' training loop, in alternation in one process.

python benchmarks/train_vs_diffusers.py                       # full SD v1 size, random weights, 256 px, bf16, CPU

Both train keys and values of all cross-attention layers and one modifier token, on the same batch
size, precision and picture size. Theirs is written from the algorithm of their example script:
diffusers' UNet with its Custom Diffusion attention processors, the autoencoder run in every step,
the whole token table trained with the gradients of ordinary tokens set to zero, AdamW, gradients
clipped. Ours is the setting that the trainer takes for the same task. The UNet's weights are equal.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one to warm up (default 3)")
    parser.add_argument("--batch", type=int, default=2, help="reference pictures of a step (default 2, theirs)")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true", help="compile our UNet (training.compile); theirs is not")
    parser.add_argument("--out", help="write the result here too")
    args = parser.parse_args()

    torch.manual_seed(0)
    ours, unet_weights = our_step(args)
    theirs = their_step(args, unet_weights)
    del unet_weights
    seconds = {"ours": [], "diffusers": []}
    # On one thread a busy machine changes the time on the clock, but hardly that of the processor.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for round_ in range(args.rounds + 1):
        for name, step in (("ours", ours), ("diffusers", theirs)):
            start = clock()
            step()
            if round_:
                seconds[name].append(clock() - start)
            print(f"round {round_} {name}: {clock() - start:.2f} s", file=sys.stderr, flush=True)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["diffusers"], strict=True)]
    result = {
        "size": args.size,
        "batch": args.batch,
        "precision": args.precision,
        "compiled": args.compile,
        "threads": torch.get_num_threads(),
        "clock": clock.__name__,
        "versions": versions(),
        "seconds": {name: [round(s, 3) for s in times] for name, times in seconds.items()},
        "ours_over_diffusers_median": round(statistics.median(ratios), 3),
        "ours_over_diffusers_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }
    print(json.dumps(result, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")


def versions() -> dict[str, str]:
    """The versions that a timing depends on."""
    import diffusers
    import transformers

    return {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}


def our_step(args: argparse.Namespace) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """Return one step of our trainer, and a copy of the UNet's weights."""
    from dci.config import FinetuneConfig
    from dci.data import ConceptDataset, Draw
    from dci.pictures import read_references
    from dci.training import ICOTraining
    from ldm import config as configuration
    from ldm.config import ModelConfig
    from ldm.diffusion import LatentDiffusion

    model = LatentDiffusion(configuration.load(ModelConfig, ROOT / "configs/model/sd-v1.yaml")).eval()
    model.config.image_size = args.size
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.unet.state_dict().items()}
    options = ["concept.class_noun=cat", "concept.initial_words=[ktn]", "context.template=photo of a {}",
               f"data.images={ROOT / 'data/concepts/cat'}", f"training.precision={args.precision}",
               "training.channels_last=true", "training.learning_rate=1e-5"]  # fmt: skip
    config = configuration.build(FinetuneConfig, {}, [*options, f"training.compile={args.compile}"])
    pictures = read_references(config.data.images, config.data, args.size)[: args.batch]
    module = ICOTraining(model, config, len(pictures))
    dataset = ConceptDataset(model, pictures, [], config.data)
    module.prepare()
    optimizer = module.configure_optimizers()
    count = iter(range(10**6))

    def step() -> None:
        number = next(count)
        (batch,) = dataset.__getitems__([[Draw(i, number, i) for i in range(args.batch)]])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = module.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, weights


def their_step(args: argparse.Namespace, weights: dict[str, Tensor]) -> Callable[[], None]:
    """Return one step of diffusers' Custom Diffusion training."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=args.size // 8)
    copy_unet(unet, weights)
    blocks = (["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4)
    vae = AutoencoderKL(3, 3, *blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=49409, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                        num_attention_heads=12, max_position_embeddings=77))  # fmt: skip
    embeddings = getattr(text, "text_model", text).embeddings.token_embedding.weight
    for network in (unet, vae, text):
        network.requires_grad_(False)
        network.to(dtype=dtype)
    layers = custom_diffusion_layers(unet)
    embeddings.requires_grad_(True)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    trained = [embeddings, *layers.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.01)
    pixels = torch.rand(args.batch, 3, args.size, args.size) * 2 - 1
    ids = torch.full((args.batch, 77), 49407)
    ids[:, :6] = torch.tensor([49406, 1125, 539, 320, 49408, 2368])  # photo of a <new1> cat
    new = torch.zeros(49409, 1, dtype=dtype)
    new[49408] = 1

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            latents = vae.encode(pixels.to(dtype)).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            t = torch.randint(0, 1000, (args.batch,))
            noisy = scheduler.add_noise(latents, noise, t)
            context = text(ids)[0]
            prediction = unet(noisy, t, context).sample
            mask = torch.ones(args.batch, 1, *latents.shape[2:])
            loss = F.mse_loss(prediction.float(), noise.float(), reduction="none")
            loss = ((loss * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean()
        loss.backward()
        embeddings.grad.mul_(new)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def copy_unet(unet: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give diffusers' UNet the same weights, by its own reading of Stable Diffusion's names."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    named = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    unet.load_state_dict(convert_ldm_unet_checkpoint(named, dict(unet.config) | {"class_embed_type": None}))


def custom_diffusion_layers(unet: nn.Module) -> nn.Module:
    """Put diffusers' processors in: trained keys and values in cross-attention, plain ones elsewhere."""
    from diffusers.loaders.utils import AttnProcsLayers
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

    processors, state = {}, unet.state_dict()
    for name in unet.attn_processors:
        layer = name.removesuffix(".processor")
        if name.endswith("attn1.processor"):
            processors[name] = CustomDiffusionAttnProcessor2_0(train_kv=False, train_q_out=False)
            continue
        keys, values = (state[f"{layer}.{kind}.weight"] for kind in ("to_k", "to_v"))
        processor = CustomDiffusionAttnProcessor2_0(True, False, hidden_size=len(keys), cross_attention_dim=keys.shape[1])
        processor.to_k_custom_diffusion.weight.data.copy_(keys)
        processor.to_v_custom_diffusion.weight.data.copy_(values)
        processors[name] = processor
    unet.set_attn_processor(processors)
    return AttnProcsLayers(unet.attn_processors)


if __name__ == "__main__":
    main()
