"""Models by their id on the hub, "owner/name", through huggingface_hub; cached, and HF_HUB_OFFLINE=1 is respected."""

import re
from pathlib import Path

from ldm.errors import UserError
from ldm.shipped import find

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = (".yaml", ".yml", ".ckpt", ".safetensors", ".pt", ".pth", ".bin")


def is_hub_id(name: str | Path) -> bool:
    """Whether a name can only be an id on the hub: "owner/name", and no such file or folder."""
    text = str(name)
    return bool(_ID.fullmatch(text)) and not text.lower().endswith(_FILES) and not find(text).exists()


def anchored(name: str | Path, root: Path) -> str:
    """Return a model's or checkpoint's name as an absolute path, relative ones seen from `root`; hub ids stay."""
    path = find(name, root)
    return str(name) if is_hub_id(name) and not path.exists() else str(path)


def snapshot(name: str, half: bool) -> Path:
    """Return the folder of a model from the hub, downloading what is missing of it.

    Only the three networks' files are fetched, in the fp16 variant if `half` and there is one.

    Raises:
        UserError: the hub cannot be reached, or has no such diffusers folder.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from ldm.formats.diffusers_folder import PARTS, SECOND, find_weights, parts_of

    def fetch(pattern: str) -> Path:
        allowed = ["model_index.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*"]
        files = [f"{part}/{file}" for part in (*PARTS, SECOND) for file in ("*.json", pattern)]
        return Path(snapshot_download(name, allow_patterns=[*allowed, *files]))

    # What is preferred first; older repositories have the other variant or format only.
    whole = ("*model.safetensors", "*model-*-of-*.safetensors")
    patterns = ["*model.fp16*.safetensors", *whole] if half else [*whole, "*model.fp16*.safetensors"]
    try:
        for pattern in [*patterns, "*model.bin"]:
            folder = fetch(pattern)
            if all(find_weights(folder / part, half) for part in parts_of(folder)):
                return folder
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"no file or folder {name}, and the hub cannot be reached and has not left '{name}' in its cache: "
            "give a path, or fetch the model on a machine with network"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"no file or folder {name}, and the hub does not give '{name}' ({reason})") from error
    raise UserError(f"'{name}' on the hub is no diffusers folder: fetch its weights' file and give its path")
