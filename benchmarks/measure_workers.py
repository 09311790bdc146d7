"""Sampling with one and with two local workers, single-threaded each, in alternation; prints the ratio as JSON.

python benchmarks/measure_workers.py --rounds 3 --out benchmarks/workers-tiny-cpu.json

Two workers share one folder and one plan. Two rates are taken: of the sampling alone, all workers having
loaded their model, from a common start to the last image written; and of the whole command, its start-up
included, which shrinks with the length of the run. It needs as many free cores as workers.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def work(folder: str, options: argparse.Namespace, ready, times) -> None:
    """Load the model, wait for the other workers, and draw what is left to draw."""
    import torch

    torch.set_num_threads(1)

    from dci.dual_branch.options import sampling_options
    from dci.samples.image_metadata import PromptMetadata, SamplingMetadata
    from dci.samples.plan import Plan
    from dci.samples.worker import sample_missing
    from dci.samples.writer import SampleFolder
    from ldm.checkpoint import load_model
    from ldm.text_to_image import text_to_image

    model = load_model(ROOT / "configs/model/tiny.yaml")
    settings = sampling_options(model, steps=options.steps)
    prompts = [f"a {noun} {place}" for noun in ("dog", "cat", "car") for place in ("on the beach", "in the snow")]
    named, metadata = [PromptMetadata(prompt) for prompt in prompts], SamplingMetadata(options=settings)
    plan = Plan(named, metadata, [0], options.images, options.batch_size)

    def sample(images):
        return text_to_image(model, [prompts[p.prompt] for p in images], [p.number for p in images], settings)

    sample([plan.image(0)])  # what is set up at the first call
    ready.wait()
    begin = time.monotonic()
    with SampleFolder(folder, plan) as samples:
        sample_missing(samples, plan.batches(), sample, lambda numbers, here: None)
    times.put((begin, time.monotonic(), len(plan)))


def measure(workers: int, options: argparse.Namespace) -> dict[str, float]:
    """Return images per second of so many workers: while sampling, and over their whole lives."""
    context = multiprocessing.get_context("spawn")  # as separate commands are: nothing is shared
    ready, times = context.Barrier(workers), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        processes = [context.Process(target=work, args=(folder, options, ready, times)) for _ in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        whole = time.monotonic() - start
        if any(process.exitcode for process in processes):
            sys.exit("a worker failed: its error is above")
        begins, ends, numbers = zip(*[times.get() for _ in processes], strict=True)
        assert len(list(Path(folder, "samples").glob("*.png"))) == numbers[0]
    return {"sampling": numbers[0] / (max(ends) - min(begins)), "whole_process": numbers[0] / whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="measurements with each number of workers (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="compared with one (default 2)")
    parser.add_argument("--images", type=int, default=32, help="of each of 6 prompts (default 32)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", help="JSON file to write, too")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which start anew

    rates = {1: [], options.workers: []}
    for _ in range(options.rounds):
        for workers, measured in rates.items():
            measured.append(measure(workers, options))
    result = {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[2], 2),
        "images": 6 * options.images,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "workers": options.workers,
    }
    for part in ("sampling", "whole_process"):
        one, several = ([rate[part] for rate in measured] for measured in rates.values())
        ratios = [b / a for a, b in zip(one, several, strict=True)]
        result[part] = {
            "images_per_second_1": round(statistics.median(one), 3),
            f"images_per_second_{options.workers}": round(statistics.median(several), 3),
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
