"""Time, memory and FLOPs of callables that are compared with one another in one process."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

Way = Callable[[], object]
"""One way to do the work that is measured."""


def compare(name: str, ways: dict[str, Way], device: str, rounds: int, rate: float = 0, compiled: bool = False) -> dict:
    """Measure ways to do the same, in alternation, after warming up.

    Args:
        name: what is done.
        ways: the first is ours; ratios are its time, and its memory, over each other's.
        rate: FLOP/s of matrix products on this device, see `matrix_rate`; 0 leaves the share out.
        compiled: some of the ways have compiled graphs in them.

    Returns:
        {"name", "clock", "ways": {way: {"median", "range", "peak_bytes", "flops", "share"}},
        "ratios": {way: {"median", "range", "memory"}}}; seconds, and bytes above those allocated before.
    """
    # Counting runs everything once, which warms up; a graph is compiled, recorded and replayed first.
    flops = {way: count_flops(call, compiled) for way, call in ways.items()}
    seconds = alternate(ways, device, rounds, warm_up=3 if compiled else 0)
    result = {"name": name, "clock": clock(device).__name__, "ways": {}, "ratios": {}}
    for way, times in seconds.items():
        figures = {**summary(times), "peak_bytes": peak_bytes(ways[way], device), "flops": flops[way]}
        result["ways"][way] = {**figures, "share": flops[way] / figures["median"] / rate if rate else None}
    ours, *others = ways
    for way in others:
        ratios = [a / b for a, b in zip(seconds[ours], seconds[way], strict=True)]
        memory = result["ways"][ours]["peak_bytes"] / max(result["ways"][way]["peak_bytes"], 1)
        result["ratios"][way] = {**summary(ratios), "memory": memory}
    return result


def summary(values: list[float]) -> dict:
    """The median and the range of some figures."""
    return {"median": statistics.median(values), "range": [min(values), max(values)]}


def alternate(ways: dict[str, Way], device: str, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Return the seconds of each way in each round; rounds to warm up come first and are not counted."""
    now, seconds = clock(device), {way: [] for way in ways}
    for round_ in range(-warm_up, rounds):
        for way, call in ways.items():
            synchronise(device)
            start = now()
            call()
            synchronise(device)
            if round_ >= 0:
                seconds[way].append(now() - start)
    return seconds


def clock(device: str) -> Callable[[], float]:
    """The processor's time for one CPU thread, which other work on the machine hardly changes; else that of the wall."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def peak_bytes(call: Way, device: str) -> int:
    """The most memory of tensors that a call held at once, above what was there before: exact, and without weights."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = peak = 0
    events = (e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def count_flops(call: Way, compiled: bool = False) -> int:
    """Floating-point operations of the matrix products and convolutions in a call, a multiply-add as 2.

    Args:
        compiled: run what was compiled operator by operator, for a graph's cannot be counted.
    """
    eagerly = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with eagerly, FlopCounterMode(display=False, custom_mapping=PACKED) as counter:
        call()
    return counter.get_total_flops()


def _packed_convolution(x: torch.Size, weight: torch.Size, *_, out_shape: torch.Size, **__) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


PACKED = {torch.ops.mkldnn._convolution_pointwise: _packed_convolution} if torch.backends.mkldnn.is_available() else {}
"""How to count the operator of `ldm.runtime.cpu_convolutions`, which PyTorch's counter does not know."""


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device, the best of some: what no network can exceed."""
    side = 8192 if device != "cpu" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(alternate({"": lambda: a @ b}, device, rounds=8)[""])
