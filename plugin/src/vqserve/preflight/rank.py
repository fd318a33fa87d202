"""One rank of the trial all-reduce: `python -m vqserve.preflight.rank RANK RANKS BACKEND STORE SECONDS`.

Every step is a line of JSON on stdout, so that whoever waits knows how far a rank came that never ends.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

SMALL_BYTES = 12 << 10
"""One token's hidden state of GLM-5.2 in bf16: what tensor parallelism reduces twice per layer."""
LARGE_BYTES = 64 << 20
"""Past the size at which a link is used to its full."""
_SMALL_TIMES, _LARGE_TIMES = 200, 10


def main(rank: int, ranks: int, backend: str, store: str, seconds: float) -> None:
    """Joins the others, reduces, and says what came and how long it took."""
    cuda = backend == "nccl"
    if cuda:
        torch.cuda.set_device(rank)
        version = ".".join(map(str, torch.cuda.nccl.version()))
        peers = all(torch.cuda.can_device_access_peer(rank, other) for other in range(ranks) if other != rank)
        say("started", nccl=version, peers=peers)
    else:
        say("started")
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds)
    )
    dist.barrier()
    say("joined")
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    small = torch.full((SMALL_BYTES // 4,), float(rank + 1), device=device)
    begin = time.perf_counter()
    dist.all_reduce(small)
    right = bool((small == ranks * (ranks + 1) / 2).all())  # waits for the GPU
    say("reduced", right=right, seconds=time.perf_counter() - begin)

    def reducing(nbytes: int) -> Callable[[], None]:
        tensor = torch.zeros(nbytes // 4, device=device)

        def once() -> None:
            dist.all_reduce(tensor)
            if cuda:
                torch.cuda.synchronize()

        return once

    latency, large = timed(reducing(SMALL_BYTES), _SMALL_TIMES), timed(reducing(LARGE_BYTES), _LARGE_TIMES)
    say("measured", latency=latency, bandwidth=2 * (ranks - 1) / ranks * LARGE_BYTES / large)
    dist.barrier()
    dist.destroy_process_group()
    say("ended")


def timed(work: Callable[[], None], times: int) -> float:
    """Median seconds, after a tenth of as many for warming up."""
    for _ in range(-(-times // 10)):
        work()
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return median(taken)


def say(step: str, **found: Any) -> None:
    """Tells whoever waits how far this rank has come."""
    sys.stdout.write(json.dumps({"step": step, **found}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], float(sys.argv[5]))
