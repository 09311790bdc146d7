"""Options of fine-tuning."""

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class ConceptConfig:
    """What is learned."""

    class_noun: str = MISSING  # the ordinary word for it, such as dog; stays frozen
    initial_words: list[str] = field(default_factory=lambda: ["ktn", "pll"])  # one per modifier token, 1 to 3


@dataclass
class DataConfig:
    """The pictures."""

    images: str = MISSING  # folder of 3-20 pictures of the concept
    regularization: str | None = None  # folder of pictures of the class, each with its caption in a .txt beside it
    flip: bool = True  # show each picture mirrored half of the time


@dataclass
class ContextConfig:
    """Image-specific contexts: learned embeddings around the concept, a set for each picture."""

    prefix: str | None = "photo of a"  # what the prefix starts from; null: N(0, 0.02)
    suffix: str | None = "."
    prefix_length: int = 3  # tokens, where there is no text to start from
    suffix_length: int = 1


@dataclass
class TrainingConfig:
    """How it is learned."""

    steps: int = 900
    batch_size: int = 6  # half of it regularization pictures, where there are any
    learning_rate: float = 6e-5  # of keys and values; rates are used as they are, never scaled
    modifier_learning_rate: float | None = None  # of the modifier tokens; null: learning_rate, as in the paper
    context_learning_rate: float = 6e-4
    weight_decay: float = 0.01
    seed: int = 0
    precision: str = "32-true"  # Lightning's name: 32-true, bf16-mixed, 16-mixed
    save_every: int | None = None  # steps between further concept files in checkpoints/; null: the last only


@dataclass
class ValidationConfig:
    """Pictures drawn while training."""

    every: int = 100  # steps; 0 draws none
    prompts: list[str] = field(default_factory=lambda: ["a photo of a V*"])
    n_samples: int = 4
    steps: int = 25  # solver steps
    seed: int = 0


@dataclass
class FinetuneConfig:
    """Everything that a fine-tuning run depends on."""

    name: str = "ico"  # ends the run folder's name
    model: str = "configs/model/tiny.yaml"
    checkpoint: str | None = None  # weights, in place of the model configuration's own
    concept: ConceptConfig = field(default_factory=ConceptConfig)
    data: DataConfig = field(default_factory=DataConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
