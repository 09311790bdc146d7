"""Fine-tuning: a step of ours, alone or beside diffusers' Custom Diffusion loop.

Both train keys and values of all cross-attention layers and one modifier token, on the same batch
size, precision and image size. Theirs is written from the algorithm of their example script:
diffusers' UNet with its Custom Diffusion attention processors, the autoencoder run in every step,
the whole token table trained with the gradients of ordinary tokens set to zero, AdamW, gradients
clipped. Ours is the setting that the trainer takes for the same task. The weights are equal.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import peers
from benchmarks.measure import compare, matrix_rate
from benchmarks.peers import ROOT, Theirs
from dci.finetuning.precision import check_device
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError

PLACEHOLDER = 49408  # the id behind CLIP's vocabulary
RUN = 900  # steps of a run, in the paper


def measure(args: argparse.Namespace) -> list[dict]:
    """Time steps on `--batch` reference images; the options are those of scripts/benchmark.py."""
    if args.peer == "pipeline":
        raise UserError("train --peer pipeline: a pipeline does not train; give --peer none or --peer diffusers")
    if args.peer == "naive":
        raise UserError("train --peer naive: training materialises no maps; give --peer none or --peer diffusers")
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    check_device(args.precision, torch.device(args.device))
    model = peers.build(args.model, torch.float32, args.device, args.size)
    theirs = copied(peers.with_weights_of(model), dtype) if args.peer == "diffusers" else None
    ours = our_step(args, model)
    ways = {"ours": ours} | ({"diffusers": their_step(args, theirs, model.config)} if theirs else {})
    size = model.config.image_size
    name = f"training step, {size}x{size} px, batch {args.batch}"
    result = compare(name, ways, args.device, args.rounds, matrix_rate(args.device, dtype), args.compile)
    runs = {f"seconds_of_{RUN}_steps,_{way}": RUN * figures["median"] for way, figures in result["ways"].items()}
    return [result | {"notes": runs}]


def copied(theirs: Theirs, dtype: torch.dtype) -> Theirs:
    """Give diffusers' networks memory of their own, in a precision."""
    for network in (theirs.unet, theirs.vae, theirs.text):
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype, copy=True)
    return theirs


def our_step(args: argparse.Namespace, model: LatentDiffusion) -> Callable[[], None]:
    """Return one step of our trainer."""
    from dci.finetuning.config import FinetuneConfig
    from dci.finetuning.dataset import BatchSlot, ConceptDataset
    from dci.finetuning.images import read_references
    from dci.finetuning.module import ICOTraining
    from ldm import config as configuration

    options = [
        "concept.class_noun=cat",
        "concept.initial_words=[ktn]",
        "context.template=photo of a {}",
        f"data.images={ROOT / 'data/concepts/cat'}",
        f"training.precision={args.precision}",
        "training.channels_last=true",
        "training.learning_rate=1e-5",
        f"training.compile={args.compile}",
    ]
    config = configuration.build(FinetuneConfig, {}, options)
    images = read_references(config.data.images, config.data, model.config.image_size)[: args.batch]
    module = ICOTraining(model, config, len(images)).to(args.device)
    dataset = ConceptDataset(model, images, [], config.data)
    module.prepare()
    optimizer = module.configure_optimizers()
    count = iter(range(10**6))

    def step() -> None:
        number = next(count)
        slots = [BatchSlot(i % len(images), number, i) for i in range(args.batch)]
        (batch,) = dataset.__getitems__([slots])
        with autocast(args):
            loss = module.loss(batch.to(args.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def autocast(args: argparse.Namespace) -> torch.autocast:
    """The context that a step's arithmetic takes its precision from."""
    dtype = getattr(torch, args.dtype)
    half = dtype if dtype != torch.float32 else torch.bfloat16
    return torch.autocast(torch.device(args.device).type, half, enabled=dtype != torch.float32)


def their_step(args: argparse.Namespace, theirs: Theirs, config) -> Callable[[], None]:
    """Return one step of diffusers' Custom Diffusion training."""
    from diffusers import DDPMScheduler

    dtype, device, size = getattr(torch, args.dtype), args.device, config.image_size
    unet, vae, text = theirs.unet, theirs.vae, theirs.text
    table = getattr(text, "text_model", text).embeddings.token_embedding
    # The new token's row, behind the vocabulary.
    table.weight = nn.Parameter(torch.cat([table.weight, table.weight[:1]]))
    new = torch.zeros(len(table.weight), 1, dtype=dtype, device=device)
    new[PLACEHOLDER] = 1
    layers = custom_diffusion_layers(unet).to(device)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    if args.compile:
        unet.compile(dynamic=False)
    trained = [table.weight, *layers.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.01)
    pixels = torch.rand(args.batch, 3, size, size, device=device) * 2 - 1
    ids = torch.full((args.batch, 77), 49407, device=device)
    ids[:, :6] = torch.tensor([49406, 1125, 539, 320, PLACEHOLDER, 2368])  # photo of a <new1> cat

    def step() -> None:
        with autocast(args):
            latents = vae.encode(pixels.to(dtype)).latent_dist.sample() * config.latent_scale
            noise = torch.randn_like(latents)
            t = torch.randint(0, 1000, (args.batch,), device=device)
            noisy = scheduler.add_noise(latents, noise, t)
            prediction = unet(noisy, t, text(ids)[0]).sample
            mask = torch.ones(args.batch, 1, *latents.shape[2:], device=device)
            loss = F.mse_loss(prediction.float(), noise.float(), reduction="none")
            loss = ((loss * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean()
        loss.backward()
        table.weight.grad.mul_(new)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


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
