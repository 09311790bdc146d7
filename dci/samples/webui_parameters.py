"""An image's metadata as text, in the words of WebUI, which reads them out of a PNG."""

import json
import re

_SAMPLERS = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m-karras": "DPM++ 2M Karras",
    "euler": "Euler",
    "euler-a": "Euler a",
}
"""What WebUI calls the solvers."""

_NAMES = {"scale": "CFG scale", "model": "Model", "strength": "Denoising strength", "eta": "Eta", "ema": "EMA"}


def parameters_text(metadata: dict) -> str:
    """Return an image's metadata as WebUI words them: the prompt, the negative prompt, a line of `Name: value`."""
    entries = {"Steps": metadata["steps"], "Sampler": _SAMPLERS[metadata["solver"]], "CFG scale": metadata["scale"]}
    entries |= {"Seed": metadata["seed"], "Size": f"{metadata['width']}x{metadata['height']}"}
    shown = {"prompt", "negative_prompt", "steps", "solver", "scale", "seed", "width", "height"}
    for name, value in metadata.items():
        if name in shown or value in (None, False, ""):
            continue
        values = {f"{name} {key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
        entries |= {_NAMES.get(key, key.replace("_", " ").capitalize()): entry for key, entry in values.items()}
    lines = [metadata["prompt"]]
    if metadata.get("negative_prompt"):
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in entries.items()))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text
