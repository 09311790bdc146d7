"""An image's facts as text, in the words of WebUI, which reads them out of a PNG."""

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


def parameters_text(facts: dict) -> str:
    """Return an image's facts as WebUI words them: the prompt, the negative prompt, a line of `Name: value`."""
    entries = {"Steps": facts["steps"], "Sampler": _SAMPLERS[facts["solver"]], "CFG scale": facts["scale"]}
    entries |= {"Seed": facts["seed"], "Size": f"{facts['width']}x{facts['height']}"}
    said = {"prompt", "negative_prompt", "steps", "solver", "scale", "seed", "width", "height"}
    for name, value in facts.items():
        if name in said or value in (None, False, ""):
            continue
        values = {f"{name} {key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
        entries |= {_NAMES.get(key, key.replace("_", " ").capitalize()): entry for key, entry in values.items()}
    lines = [facts["prompt"]]
    if facts.get("negative_prompt"):
        lines.append(f"Negative prompt: {facts['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in entries.items()))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text
