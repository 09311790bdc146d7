"""What the page's program is started with."""

from dataclasses import dataclass
from pathlib import Path

from dci.app.studio import Weights


@dataclass(frozen=True)
class Settings:
    """What the program is started with."""

    weights: Weights
    concepts: tuple[Path, ...] = ()
    logdir: Path = Path("logs")
    host: str = "127.0.0.1"
    port: int = 7860
    clip: str = "tiny"  # encoders of the plane, see `dci.evaluation.encoders`
    instance: str = "tiny"
