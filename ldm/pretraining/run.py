"""Train one part of the embedded model and put its weights where the model's configuration expects them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm import checkpoint
from ldm import config as configuration
from ldm.autoencoder import AutoencoderKL
from ldm.config import ModelConfig
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.pretraining.cache import RenderedWorld, held_out_world, rendered_world, world_digest
from ldm.pretraining.config import PretrainConfig
from ldm.pretraining.diffusion import CaptionTable, DiffusionPretraining, LatentDataset, TextToImage
from ldm.pretraining.latents import encoded_world, encoder_digest, latent_scale
from ldm.pretraining.loop import Finish, fit, restore
from ldm.pretraining.run_encoders import pretrain_encoder
from ldm.pretraining.vae import VAEPretraining, psnr

VAE_FILE, UNET_FILE, TEXT_FILE = "vae.safetensors", "unet.safetensors", "text.safetensors"


class ImageDataset(Dataset):
    """Rendered images as tensors (3, 64, 64) uint8."""

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.images[index].copy()).permute(2, 0, 1)


def pretrain(config: PretrainConfig, root: Path, export: bool = False) -> None:
    """Train the part that `config` names; its paths are relative to `root`.

    Args:
        export: do not train, but save the weights of the last checkpoint.

    Raises:
        UserError: an unknown part, missing artwork, or a diffusion model without its autoencoder.
    """
    trainers = {"vae": _pretrain_vae, "diffusion": _pretrain_diffusion}
    trainers |= dict.fromkeys(("clip", "instance", "classifier"), _pretrain_encoder)
    if config.part not in trainers:
        raise UserError(f"part={config.part}: expected one of {', '.join(trainers)}")
    model_config = configuration.load(ModelConfig, root / config.model)
    world = rendered_world(config.world, root / config.cache, root / config.world.artwork)
    torch.manual_seed(config.seed)
    finish = restore if export else fit
    trainers[config.part](config, LatentDiffusion(model_config), world, root, finish)


def _pretrain_encoder(
    config: PretrainConfig, model: LatentDiffusion, world: RenderedWorld, root: Path, finish: Finish
) -> None:
    _load_part(model.autoencoder, _weights_folder(model, root) / VAE_FILE, "first_stage_model.")
    pretrain_encoder(config, model, world, root, finish)


def _pretrain_vae(config: PretrainConfig, model: LatentDiffusion, world: RenderedWorld, root: Path, finish: Finish) -> None:
    weights = _weights_folder(model, root) / VAE_FILE
    if config.decoder_only or config.warm_start:
        _load_part(model.autoencoder, weights, "first_stage_model.")
    module = VAEPretraining(model.autoencoder, config)
    finish(module, ImageDataset(world.images), root / config.cache / config.name)
    trained = module.averaged()
    checkpoint.save_weights(_prefixed(trained.state_dict(), "first_stage_model."), weights)
    moments = encoded_world(trained, world.images[:2000], _latent_file(config, root, trained, 2000), module.device)
    print(f"PSNR on held-out images: {psnr(trained, held_out_world(config, root).images[:1000]).mean():.2f} dB")
    print(f"saved {weights}; put into {config.model}: latent_scale: {latent_scale(moments):.4f}")


def _pretrain_diffusion(
    config: PretrainConfig, model: LatentDiffusion, world: RenderedWorld, root: Path, finish: Finish
) -> None:
    folder = _weights_folder(model, root)
    _load_part(model.autoencoder, folder / VAE_FILE, "first_stage_model.")
    text = model.config.text_encoder
    with torch.no_grad():
        model.text_encoder.token_table.copy_(checkpoint.token_table(text.width, text.vocab_size))
    if config.warm_start:
        checkpoint.load_weights(model, checkpoint.read_state_dict(folder), source=str(folder))
    table = CaptionTable(world.captions)
    file = _latent_file(config, root, model.autoencoder, len(world.images))
    moments = encoded_world(model.autoencoder, world.images, file, torch.device("cpu"))
    network = TextToImage(model, table.token_ids)
    module = DiffusionPretraining(network, table, model, config)
    finish(module, LatentDataset(moments, table), root / config.cache / config.name)
    save_diffusion(module.averaged(), table.token_ids, folder)


def save_diffusion(network: TextToImage, token_ids: np.ndarray, folder: Path) -> None:
    """Write the UNet and the text transformer under SD's names, the token table as its trained rows."""
    checkpoint.save_weights(_prefixed(network.unet.state_dict(), "model.diffusion_model."), folder / UNET_FILE)
    text = _prefixed(network.text.state_dict(), "cond_stage_model.")
    del text[checkpoint.TOKEN_TABLE]
    checkpoint.save_weights({**text, **checkpoint.pack_token_table(network.rows, token_ids)}, folder / TEXT_FILE)


def _weights_folder(model: LatentDiffusion, root: Path) -> Path:
    if model.config.checkpoint is None:
        raise UserError(f"the model '{model.config.name}' has no checkpoint folder to put weights into: add checkpoint=")
    return root / model.config.checkpoint


def _latent_file(config: PretrainConfig, root: Path, autoencoder: AutoencoderKL, number: int) -> Path:
    digest = world_digest(config.world, root / config.world.artwork)
    world = f"{config.world.seed}-{number}-{digest}"
    return root / config.cache / f"latents-{world}-{encoder_digest(autoencoder)}.pt"


def _prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def _load_part(module: torch.nn.Module, file: Path, prefix: str) -> None:
    state, _ = checkpoint.read_safetensors(file)
    module.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})
