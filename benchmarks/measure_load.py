"""Load one model in this process and print its peak memory and time; benchmarks/load.py and the full-size tests call it.

python benchmarks/measure_load.py MODEL fp16
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

    from ldm.checkpoint import load_model

    dtype = {"fp16": torch.float16, "fp32": torch.float32}[sys.argv[2]]
    start = time.perf_counter()
    load_model(sys.argv[1], dtype=dtype)
    print(json.dumps({"seconds": round(time.perf_counter() - start, 2), "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
