"""Options of the embedded model's pretraining."""

from dataclasses import dataclass, field


@dataclass
class WorldConfig:
    """The images that the parts are trained on."""

    artwork: str = ".artwork"  # where scripts/fetch_artwork.sh put the sprites
    seed: int = 0
    images: int = 100_000
    wide: bool = False  # beside the 64 nouns, in half of the subjects, every drawn thing of the two packages


@dataclass
class PretrainConfig:
    """Training of one part of the embedded model."""

    name: str = "vae"  # folder of its checkpoints within the cache
    part: str = "vae"  # vae, diffusion (UNet and text transformer together), clip, instance, classifier
    model: str = "configs/model/tiny.yaml"  # shapes, and where the weights go (its checkpoint folder)
    cache: str = ".pretraining"  # rendered images, latents, and checkpoints to resume from
    encoders: str = "data/tiny/encoders"  # where the weights of clip, instance and classifier go
    warm_start: bool = False  # begin with the present weights
    world: WorldConfig = field(default_factory=WorldConfig)
    seed: int = 0
    steps: int = 3000
    batch_size: int = 32  # of each process
    learning_rate: float = 1e-3
    warmup: int = 200  # steps of linear warm-up
    decay_from: float = 0.3  # share of the steps after which the rate falls as a half cosine to 2 %
    ema: float = 0.999  # decay of the averaged weights, which are the ones kept
    precision: str = "bf16-mixed"  # Lightning's name: 32-true, bf16-mixed, 16-mixed
    accelerator: str = "auto"
    devices: int = 1  # processes that share each step; on a CPU give each one thread (OMP_NUM_THREADS=1)
    compile: bool = False  # torch.compile the network; pays from about ten minutes of training on
    checkpoint_every: int = 250  # steps
    caption_dropout: float = 0.1  # diffusion: share of images trained with the empty caption
    kl_weight: float = 1e-4  # vae: weight of the posterior's KL per latent value
    decoder_only: bool = False  # vae: leave the encoder as it is, so that cached latents stay valid
    full_context_from: float = 0.85  # diffusion: share of the steps after which all 77 positions are trained
