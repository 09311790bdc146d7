"""Options of fine-tuning."""

from dataclasses import dataclass, field

from ldm.errors import UserError

GENERATE = "generate"
"""In place of a regularization folder: images that the base model makes first."""


AUTO = "auto"
"""In place of a run to resume: the newest one of the same name and options."""

ANY_SEED = -1
"""In place of a seed: one is chosen, printed and recorded in the run's configuration."""


@dataclass
class ConceptConfig:
    """A concept to learn."""

    class_noun: str | None = None  # the ordinary word for it, such as dog; stays frozen
    initial_words: list[str] | None = None  # one per modifier token, 1 to 3; null: INITIAL_WORDS, of several one each
    images: str | None = None  # folder of 3-20 images; null: data.images
    regularization: str | None = None  # null: data.regularization


INITIAL_WORDS = ["ktn", "pll"]
"""What the modifier tokens of a concept start from that is learned by itself."""


@dataclass
class DataConfig:
    """The images."""

    images: str | None = None  # folder of 3-20 images of the concept
    regularization: str | None = None  # folder of captioned images of the class, `generate`, or null for none
    flip: bool = True  # show each image mirrored half of the time
    crop: str = "square"  # the middle square, or bucket: the nearest usual aspect ratio, for references and class alike
    augment: str = "none"  # none, or random-resize: Custom Diffusion's, with its mask and caption prefixes
    cache_latents: bool | None = None  # encode each image once; null: wherever the augmentation allows it
    masked_loss: bool = False  # count the object's pixels: its mask is NAME.mask.png beside the image, or its alpha
    background_weight: float = 0.0  # weight of the pixels outside the mask, 0 to 1
    on_bad_image: str = "error"  # error, or skip: leave a file that cannot be read out, and name it


@dataclass
class GenerateConfig:
    """Regularization images that the base model makes before training (data.regularization=generate)."""

    number: int = 200
    prompts: list[str] = field(default_factory=lambda: ["photo of a {}"])  # taken in turn; {} is the class noun
    steps: int | None = None  # solver steps; null: the model's
    scale: float | None = None  # guidance; null: the model's
    batch_size: int = 8  # images made at a time; has no influence on them
    seed: int = 0
    folder: str | None = None  # where they are kept; null: regularization/ in the log folder


@dataclass
class ContextConfig:
    """Image-specific contexts: learned embeddings around the concept, a set for each image."""

    template: str | None = None  # fixed words in place of learned contexts, such as "photo of a {}"
    shared: bool = False  # one learned context for all images of a concept
    prefix: str | None = "photo of a"  # what the prefix starts from; null: N(0, 0.02); "": no prefix
    suffix: str | None = "."
    prefix_length: int = 3  # tokens, where there is no text to start from
    suffix_length: int = 1


@dataclass
class TrainingConfig:
    """How it is learned."""

    steps: int = 900
    lora_rank: int | None = None  # train keys and values as changes of this rank; null: as they are
    trainable: str = "crossattn-kv"  # of the UNet: crossattn-kv, crossattn (all of cross-attention), none
    batch_size: int = 6  # images of a step, over all devices; half of it regularization images, where there are any
    micro_batch: int | None = None  # images that a device takes at a time, at most; null: its whole share
    learning_rate: float = 6e-5  # of the UNet's weights; rates are used as they are
    modifier_learning_rate: float | None = None  # of the modifier tokens; null: learning_rate, as in the paper
    context_learning_rate: float = 6e-4
    scale_lr: bool = False  # multiply all rates by the number of reference images of a step, as the authors' code does
    weight_decay: float = 0.01
    seed: int = 0  # -1 chooses one; a run that goes on keeps its own
    precision: str = "fp32"  # fp32, bf16, fp16: of the arithmetic and the frozen weights; what is trained is fp32
    gradient_sum: str = "fp64"  # of micro-batches and processes: fp64, the same in any order; or fp32, half the memory
    gradient_checkpointing: bool = False  # less memory, about a third more time
    channels_last: bool = False
    compile: bool = False  # torch.compile the UNet
    devices: int = 1  # processes on this node
    nodes: int = 1
    save_every: int | None = None  # steps between further concept files in checkpoints/; null: the last only
    checkpoint_every: int | None = 100  # steps between checkpoints to resume from; null: at the end and when stopped
    keep_last: int = 2  # how many of those are kept


@dataclass
class ValidationConfig:
    """Images sampled while training, from fixed noise: with DCI and without, side by side."""

    every: int = 100  # steps; 0 samples none
    prompts: list[str] = field(default_factory=lambda: ["a photo of a V*"])
    n_samples: int = 4
    steps: int = 25  # solver steps
    seed: int = 0


@dataclass
class LoggingConfig:
    """Where the loss and the images go besides metrics.csv and samples/."""

    every: int = 10  # steps
    tensorboard: bool = True
    wandb: str | None = None  # a project of Weights & Biases; needs the package wandb


@dataclass
class FinetuneConfig:
    """Everything that a fine-tuning run depends on."""

    name: str = "ico"  # ends the run folder's name
    resume: str | None = None  # a run folder or a checkpoint of it; auto: the newest run of this name, if any
    model: str = "configs/model/tiny.yaml"
    checkpoint: str | None = None  # weights, in place of the model configuration's own
    vae: str | None = None  # an autoencoder's file or folder, in place of the weights' own
    loras: list[str] = field(default_factory=list)  # put on the base model first: FILE or FILE:0.8, with a strength
    concept: ConceptConfig = field(default_factory=ConceptConfig)  # the short form of a list of one
    concepts: list[ConceptConfig] = field(default_factory=list)  # one or several, learned together
    data: DataConfig = field(default_factory=DataConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass
class LearnedConcept:
    """A concept that a run learns, with the defaults that other options give filled in."""

    class_noun: str
    initial_words: list[str]
    images: str | None
    regularization: str | None


def concepts_of(config: FinetuneConfig) -> list[LearnedConcept]:
    """Return the concepts that a run learns, one or several.

    Raises:
        UserError: one has no class noun.
    """
    learned = []
    for number, entry in enumerate(entries_of(config)):
        if not entry.class_noun or entry.initial_words is None:
            name = f"concepts[{number}].class_noun" if config.concepts else "concept.class_noun"
            raise UserError(f"{name} must be given: the ordinary word for the concept, such as dog")
        learned.append(LearnedConcept(entry.class_noun, entry.initial_words, entry.images, entry.regularization))
    return learned


def entries_of(config: FinetuneConfig) -> list[ConceptConfig]:
    """Return the concepts' options, one's or several's, with the defaults that others give filled in."""
    from dci.concept.modifier_tokens import RARE_TOKENS  # with torch, which takes seconds; options need none

    entries = config.concepts or [config.concept]
    words = config.concept.initial_words or INITIAL_WORDS
    if len(entries) > 1:
        rare = list(RARE_TOKENS)
        chosen = [[rare[i % len(rare)]] for i in range(len(entries))]
    else:
        chosen = [words]
    return [
        ConceptConfig(
            entry.class_noun,
            own if entry.initial_words is None else entry.initial_words,
            entry.images or config.data.images,
            entry.regularization or config.data.regularization,
        )
        for own, entry in zip(chosen, entries, strict=True)
    ]
