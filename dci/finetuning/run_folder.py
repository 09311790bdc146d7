"""Run folders: a new one, or the one to go on with."""

import dataclasses
import glob
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock

from dci.files import folder_lock, make_new_folder
from dci.finetuning import distributed
from dci.finetuning.checkpoints import Checkpoints, read_checkpoint
from dci.finetuning.config import ANY_SEED, AUTO, FinetuneConfig, concepts_of
from dci.finetuning.config_files import map_paths
from ldm import config as configuration
from ldm.errors import UserError

CONCEPT_FILE = "concept.safetensors"
CONFIG_FILE = Path("configs") / "config.yaml"

_FREE = (
    "name",
    "resume",
    "validation.",
    "logging.",
    "generate.batch_size",
    "training.steps",
    "training.micro_batch",
    "training.gradient_checkpointing",
    "training.channels_last",
    "training.compile",
    "training.devices",
    "training.nodes",
    "training.save_every",
    "training.checkpoint_every",
    "training.keep_last",
)
"""What may change when a run goes on: how it is watched, where it computes, how far it goes."""


@dataclasses.dataclass
class Run:
    """A run folder and where in the run to begin."""

    folder: Path
    state: dict[str, Any] | None = None  # of the checkpoint to go on from; None: from the beginning
    _lock: filelock.BaseFileLock | None = None  # held while the run is alive; the system gives it back however the run ends

    @property
    def step(self) -> int:
        """Steps that are made already."""
        return 0 if self.state is None else self.state["step"]

    def lock(self) -> None:
        """Keep other processes from training into this folder.

        Raises:
            UserError: one is at it already.
        """
        lock = folder_lock(self.folder)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise UserError(f"{self.folder} is being trained by another process: wait, or give another name=") from error
        self._lock = lock

    def check_origin(self, base: str, model: str, images: str) -> None:
        """Compare what a run is made from with what it was begun with, wherever that lies now.

        Args:
            base, model, images: digests.

        Raises:
            UserError: it is going on from a checkpoint with other digests.
        """
        if self.state is None:
            return
        if self.state["base"] != base or self.state.get("model", model) != model:
            raise UserError(f"{self.folder} was trained on another base model: give its own with model= and checkpoint=")
        if self.state.get("images", self.state.get("pictures")) != images:  # version 0.1 said pictures
            raise UserError(
                f"the images or captions have changed since {self.folder} was begun: "
                "put the old ones back, or start a new run"
            )

    def release(self) -> None:
        """Let others train into this folder again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def finished(self) -> bool:
        """Whether the concept file is there, for as many steps as the last checkpoint has."""
        return self.state is not None and (self.folder / CONCEPT_FILE).is_file()


def find_run(config: FinetuneConfig, logdir: Path) -> Run | None:
    """Return the run to go on with (`config.resume`), locked; None: there is none, or none is asked for.

    Raises:
        UserError: there is no such run, it has other options, or another process is at it.
    """
    run = None
    if config.resume == AUTO:
        run = _newest(config, logdir)
    elif config.resume is not None:
        run = _resumed(config, Path(config.resume))
    if run is not None and run.step > config.training.steps:
        raise UserError(f"training.steps={config.training.steps}, but {run.folder} has made {run.step} already: give more")
    if run is not None and distributed.rank() == 0:
        run.lock()
        for half_written in run.folder.rglob(".*.tmp"):
            half_written.unlink()
    return run


def with_seed(config: FinetuneConfig, run: Run | None) -> FinetuneConfig:
    """Return options whose seed is no longer open: that of the run to go on with, or one that is chosen here.

    Raises:
        UserError: several processes would choose one each.
    """
    if config.training.seed != ANY_SEED:
        return config
    if run is None:
        seed = distributed.chosen_seed()
    else:
        seed = configuration.load(FinetuneConfig, run.folder / CONFIG_FILE).training.seed
    distributed.print_rank_zero(f"Seed: {seed}")
    return dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))


def new_run(config: FinetuneConfig, logdir: Path) -> Run:
    """Make a run's folder, locked; processes other than the first write nothing and need none."""
    if distributed.rank() > 0:
        return Run(logdir)
    run = Run(make_run_folder(logdir, config.name))
    run.lock()
    return run


def make_run_folder(logdir: Path, name: str) -> Path:
    """Make and return logdir/<date>_<name>, with a number behind it where that is taken."""
    folder = make_new_folder(logdir, f"{datetime.now():%Y-%m-%dT%H-%M-%S}_{name}")
    for part in ("checkpoints", "configs", "samples"):
        (folder / part).mkdir()
    return folder


def run_folder_of(path: str | Path) -> Path:
    """Return the run folder of a run folder, or of a checkpoint in it.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    folder = path.parent.parent if path.suffix == ".ckpt" else path
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"no run at {path}: give a run folder that training made, such as logs/DATE_NAME")
    return folder


def _newest(config: FinetuneConfig, logdir: Path) -> Run | None:
    """The newest run of the same name and options."""
    folders = (file.parent.parent for file in logdir.glob(f"*_{glob.escape(config.name)}*/{CONFIG_FILE}"))
    for folder in sorted(folders, reverse=True):
        try:
            same_name = configuration.load(FinetuneConfig, folder / CONFIG_FILE).name == config.name
            if same_name and _difference(config, folder, moved=False) is None:
                return _last_state(folder)
        except UserError:  # a folder of another program, or of another version
            continue
    return None


def _resumed(config: FinetuneConfig, path: Path) -> Run:
    folder = run_folder_of(path)
    if different := _difference(config, folder, moved=True):
        name, now, before = different
        raise UserError(
            f"{name}={now}, but the run {folder} has {before}: a resumed run keeps it; leave it out, or start a new run"
        )
    return Run(folder, read_checkpoint(path)) if path.suffix == ".ckpt" else _last_state(folder)


def _last_state(folder: Path) -> Run:
    """The run at its last checkpoint that can be read."""
    files = Checkpoints(folder / "checkpoints", keep=1).files()
    for file in reversed(files):
        try:
            return Run(folder, read_checkpoint(file))
        except UserError as error:
            distributed.print_rank_zero(f"{error}; trying the one before")
    return Run(folder)


def _difference(config: FinetuneConfig, folder: Path, moved: bool) -> tuple[str, Any, Any] | None:
    """The first option that a resumed run may not change, but does: (name, now, before).

    Args:
        moved: what a path leads to may lie elsewhere now; `Run.check_origin` compares its content.
    """
    contents = [dataclasses.asdict(c) for c in (configuration.load(FinetuneConfig, folder / CONFIG_FILE), config)]
    given = [_flat(content) for content in contents]
    for content in contents if moved else []:
        map_paths(content, lambda key, value: "a path")
    before, now = map(_flat, contents)
    free = (*_FREE, "training.seed") if config.training.seed == ANY_SEED else _FREE
    names = (name for name in now if not name.startswith(free) and now[name] != before[name])
    return next(((name, given[1][name], given[0][name]) for name in names), None)


def what_a_run_keeps(config: FinetuneConfig) -> dict[str, Any]:
    """Return the options that the result of a run depends on, by their dotted names."""
    free = (*_FREE, "concept.", "data.images") if config.concepts else _FREE  # the short form of what is in the list
    kept = {name: value for name, value in _flat(dataclasses.asdict(config)).items() if not name.startswith(free)}
    return kept | {"training.steps": config.training.steps, "concepts": [vars(entry) for entry in concepts_of(config)]}


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
