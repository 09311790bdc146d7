"""Load one model in this process and print its peak memory and time; benchmarks/load.py and the full-size tests call it.

python benchmarks/measure_load.py MODEL fp16
python benchmarks/measure_load.py FOLDER fp16 diffusers
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def peak_bytes() -> int:
    """The largest resident memory of this process so far, mapped files included.

    From the kernel's own account of this program: getrusage would also count what the parent held before.
    """
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    import torch

    path, precision, *library = sys.argv[1:]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    load = load_with_diffusers if library == ["diffusers"] else load_ours
    start = time.perf_counter()
    load(path, dtype)
    print(json.dumps({"seconds": round(time.perf_counter() - start, 2), "peak_bytes": peak_bytes()}))


def load_ours(path: str, dtype) -> None:
    """Load as the programs do."""
    from ldm.checkpoint import load_model

    load_model(path, dtype=dtype)


def load_with_diffusers(folder: str, dtype) -> list:
    """Load the three networks as StableDiffusionPipeline does."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    return [kind.from_pretrained(folder, subfolder=part, torch_dtype=dtype) for part, kind in kinds.items()]


if __name__ == "__main__":
    main()
