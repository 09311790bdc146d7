"""Results as JSON and Markdown files, with the machine they were measured on."""

import json
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch


def environment(device: str) -> dict:
    """The machine and the versions that figures depend on."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "diffusers", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if device != "cpu":
        versions["cuda"] = torch.version.cuda
    name = _processor() if device == "cpu" else torch.cuda.get_device_name(device)
    threads = torch.get_num_threads() if device == "cpu" else None
    return {"device": name, "threads": threads, "versions": versions}


def write(folder: Path, arguments: dict, results: list[dict]) -> Path:
    """Write NAME.json and NAME.md, named after the arguments, and return the latter.

    Args:
        arguments: of the script, as given or by default.
        results: what `benchmarks.measure.compare` and its like return.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = (arguments[key] for key in ("what", "model", "peer", "device", "precision"))
    stem = "-".join(str(part).replace(":", "") for part in parts)
    stem += f"-batch{arguments['batch']}" if arguments["batch"] != 1 else ""
    stem += f"-{arguments['size']}px" if arguments["size"] else ""
    stem += "-compiled" if arguments["compile"] else ""
    content = {
        "command": " ".join(["python scripts/benchmark.py", *sys.argv[1:]]),
        **environment(arguments["device"]),
        "arguments": arguments,
        "measurements": results,
    }
    (folder / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    page = folder / f"{stem}.md"
    page.write_text(markdown(content))
    return page


def markdown(content: dict) -> str:
    """Return a report as a page: where it was measured, and a table."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    threads = f", {content['threads']} thread(s)" if content["threads"] else ""
    lines = [f"`{content['command']}`", "", f"{content['device']}{threads}; {versions}", ""]
    lines += ["| | seconds (range) | ours over it (range) | peak memory | ours over it | GFLOP | of matrix rate |"]
    lines += ["|---|---|---|---|---|---|---|"]
    notes = []
    for result in content["measurements"]:
        for way, figures in result["ways"].items():
            ratio = result["ratios"].get(way, {})
            cells = [f"{result['name']}: {way}", _ranged(figures), _ranged(ratio), _mib(figures.get("peak_bytes"))]
            cells += [_number(ratio.get("memory")), _number(figures.get("flops"), 1e-9), _percent(figures.get("share"))]
            lines.append(f"| {' | '.join(cells)} |")
        notes += [f"{result['name']}: {key.replace('_', ' ')} {value:.4g}" for key, value in result.get("notes", {}).items()]
    clocks = {result["clock"] for result in content["measurements"]}
    return "\n".join([*lines, "", *(f"* {note}" for note in notes), f"* Clock: {', '.join(sorted(clocks))}."]) + "\n"


def _ranged(figures: dict) -> str:
    if not figures:
        return ""
    low, high = figures["range"]
    return f"{figures['median']:.3g} ({low:.3g} to {high:.3g})"


def _number(value: float | None, scale: float = 1) -> str:
    return "" if value is None else f"{value * scale:.3f}"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f} MiB"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _processor() -> str:
    """The processor's name; Linux has it in /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
