"""How scores were made: what a report says beside its numbers, and what their files keep."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BootstrapMetadata:
    """How intervals were made."""

    level: float  # share of the resampled means that an interval holds
    resamples: int
    seed: int


@dataclass(frozen=True)
class KidMetadata:
    """What a kernel inception distance was taken between."""

    features: str  # name of the encoder
    regularization: str  # folder of the real images
    real: int  # how many of them
    subset_size: int
    std_over_subsets: float


@dataclass(frozen=True)
class ScoringMetadata:
    """How the scores of a folder, or of several concepts' folders, were made."""

    folder: str = ""
    images: int = 0
    references: tuple[str, ...] = ()  # files
    encoders: dict[str, str] = field(default_factory=dict)  # role (clip, instance, kid) -> name
    preprocessing: dict[str, str] = field(default_factory=dict)  # role -> how images are brought to size
    interval: BootstrapMetadata | None = None
    resampled: dict[str, int] = field(default_factory=dict)  # factor -> number of its levels
    object_only: str = ""  # how many images had a mask, in a sentence; "": masks were not asked for
    kid: KidMetadata | None = None
    concepts: tuple[str, ...] = ()  # of pooled scores
