"""Times on a GPU: medians of CUDA graphs with cold caches, and what the card could do at best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

COLD = 512 << 20
"""Bytes written between two runs: more than any L2 cache holds."""


def graph_us(calls: Sequence[Callable[[], object]], repeats: int = 17) -> float:
    """Median time of a call in microseconds, calls one after the other in a CUDA graph as layers of a model are.

    Args:
        calls: What to time; must not wait for the device. Each should read what the others do not, so that the L2
            cache has nothing of it.
        repeats: Runs that the median is taken of.
    """
    for _ in range(2):  # compiles, allocates
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _median_us(graph.replay, repeats) / len(calls)


def eager_us(call: Callable[[], object], repeats: int = 5) -> float:
    """Median time of a call in microseconds, the host's part in it."""
    call()
    return _median_us(call, repeats)


def _median_us(call: Callable[[], object], repeats: int) -> float:
    cold = torch.empty(COLD, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        cold.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return float(median(times))


def kernel_us(call: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """Microseconds per call of every kernel by name, caches as they are, from torch's profiler."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total / repeats for event in profile.key_averages()}
    return {name: time for name, time in times.items() if time}


def copy_bandwidth() -> float:
    """Bytes per second, read and written ones added, of torch's copy of 1 GiB: by a kernel, not a copy engine."""
    source = torch.zeros(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_us([lambda: torch.neg(source, out=target)] * 4) * 1e6


def shared_bandwidth() -> float:
    """Bytes per second that all multiprocessors' shared memory moves at the highest clock: 128 per clock each."""
    card = torch.cuda.get_device_properties()
    return 128.0 * card.multi_processor_count * card.clock_rate * 1e3


def machine() -> Mapping[str, str]:
    """The card and the versions that a figure is worth something with."""
    card = torch.cuda.get_device_properties()
    return {
        "gpu": card.name,
        "compute capability": f"{card.major}.{card.minor}",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }
