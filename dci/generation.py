"""Regularization pictures made by the base model, kept in a folder for the next run."""

import hashlib
import io
import json
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from dci import processes
from dci.config import GenerateConfig
from dci.files import write_atomically
from dci.settings import sampling_options
from ldm.checkpoint import fingerprint
from ldm.diffusion import LatentDiffusion
from ldm.images import to_pictures
from ldm.sampling import SamplingOptions, text_to_image

PATIENCE = 24 * 3600  # seconds that a process waits for the pictures of the others


def generate(model: LatentDiffusion, config: GenerateConfig, class_noun: str, logdir: Path) -> Path:
    """Make the missing ones of `config.number` captioned pictures of a class.

    A picture depends on its number, its prompt and the model alone, so an interrupted stage goes on
    where it stopped, a larger number adds to what is there, and several processes share the work.

    Args:
        model: the base model, unchanged.
        logdir: holds the folder where the configuration names none.

    Returns:
        The folder: NNNNN.png and NNNNN.txt, and settings.json that tells how they were made.
    """
    options = sampling_options(model, steps=config.steps, scale=config.scale, seed=config.seed)
    prompts = [prompt.replace("{}", class_noun) for prompt in config.prompts]
    settings = {"base": fingerprint(model), "prompts": prompts, "options": asdict(options)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    root = Path(config.folder) if config.folder else logdir / "regularization"
    folder = root / f"{class_noun.replace(' ', '-').replace('/', '-')}-{digest}"
    missing = [i for i in range(config.number) if not _whole(folder, i)]
    if missing:
        write_atomically(folder / "settings.json", json.dumps(settings, indent=2).encode())
        _make(model, prompts, options, config, folder, missing)
        _wait(folder, config.number)
    processes.say(f"Regularization: {config.number} pictures of '{class_noun}' made by the base model, in {folder}")
    return folder


def _make(
    model: LatentDiffusion,
    prompts: list[str],
    options: SamplingOptions,
    config: GenerateConfig,
    folder: Path,
    missing: list[int],
) -> None:
    own = [i for i in missing if i % processes.world_size() == processes.rank() % processes.world_size()]
    with tqdm(total=config.number, initial=config.number - len(own), desc="regularization pictures", unit="picture",
              disable=processes.rank() > 0) as bar:  # fmt: skip
        for k, prompt in enumerate(prompts):
            numbers = [i for i in own if i % len(prompts) == k]
            for start in range(0, len(numbers), config.batch_size):
                batch = numbers[start : start + config.batch_size]
                for i, picture in zip(batch, to_pictures(text_to_image(model, prompt, batch, options)), strict=True):
                    content = io.BytesIO()
                    picture.save(content, "PNG")
                    write_atomically(folder / f"{i:05}.txt", prompt.encode())
                    write_atomically(folder / f"{i:05}.png", content.getvalue())
                bar.update(len(batch))


def _whole(folder: Path, i: int) -> bool:
    return (folder / f"{i:05}.png").is_file() and (folder / f"{i:05}.txt").is_file()


def _wait(folder: Path, number: int) -> None:
    """Wait for the other processes' pictures."""
    end = time.monotonic() + PATIENCE
    while not all(_whole(folder, i) for i in range(number)):
        if time.monotonic() > end:
            raise TimeoutError(f"{folder} still lacks pictures that other processes were to make")
        time.sleep(0.5)
