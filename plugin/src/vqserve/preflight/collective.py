"""A trial all-reduce over the ranks that would serve, in processes of their own, with a deadline.

Two cards without NVLink can hang in their first all-reduce (NVIDIA/nccl#1999, vllm#51513): the GPUs draw 100 W at
100 % and nothing is said. Here that takes no longer than the deadline, and the ranks are ended after it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

STEPS = ("started", "joined", "reduced", "measured", "ended")
"""What a rank says, in this order."""

_POLL_SECONDS = 0.05
_WAITING_FOR = {
    None: "it did not start",
    "started": "it waited for the others to join",
    "joined": "it hung in the first all-reduce",
    "reduced": "it hung in repeated all-reduces",
    "measured": "it hung while leaving",
}

Program = Callable[[int, str], Sequence[str]]
"""Command line of a rank, by its number and the file through which the ranks find each other."""


@dataclass(frozen=True)
class AllReduce:
    """How a trial went.

    Attributes:
        problem: What went wrong, in words; None if nothing did.
        latency: Median seconds of a reduction of one token's hidden state, of the slowest rank.
        bandwidth: Bytes per second over the slowest link, of a large reduction.
        nccl: NCCL's version; None on CPUs.
        peers: Whether every GPU may read the others' memory; None on CPUs.
    """

    problem: str | None
    latency: float | None = None
    bandwidth: float | None = None
    nccl: str | None = None
    peers: bool | None = None


def all_reduce(
    ranks: int,
    backend: Literal["nccl", "gloo"],
    seconds: float,
    environment: Mapping[str, str] | None = None,
    program: Program | None = None,
) -> AllReduce:
    """Has `ranks` processes reduce together, and ends them all after `seconds`.

    Args:
        ranks: How many.
        backend: NCCL on GPUs, gloo on CPUs.
        seconds: From the start of the processes to their end.
        environment: Variables to set for them.
        program: What to run as a rank; `vqserve.preflight.rank` if None.
    """
    run = program or (lambda rank, store: _program(rank, ranks, backend, store, seconds))
    with tempfile.TemporaryDirectory(prefix="vqserve-preflight-") as name:
        folder = Path(name)
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                with (folder / f"{rank}.out").open("wb") as out, (folder / f"{rank}.err").open("wb") as err:
                    command = run(rank, str(folder / "store"))
                    started.append(
                        subprocess.Popen(
                            command,
                            stdin=subprocess.DEVNULL,
                            stdout=out,
                            stderr=err,
                            env=os.environ | (environment or {}),
                            start_new_session=True,
                        )
                    )
            codes = _wait(started, time.monotonic() + seconds)
        finally:
            for process in started:
                _end(process)
        said = [_said(folder / f"{rank}.out") for rank in range(ranks)]
        errors = [_last_line(folder / f"{rank}.err") for rank in range(ranks)]
    first = said[0].get("started", {})
    problem = _problem(codes, said, errors, seconds)
    if problem is not None:
        return AllReduce(problem, nccl=first.get("nccl"), peers=first.get("peers"))
    return AllReduce(
        None,
        max(steps["measured"]["latency"] for steps in said),
        min(steps["measured"]["bandwidth"] for steps in said),
        first.get("nccl"),
        None if first.get("peers") is None else all(steps["started"]["peers"] for steps in said),
    )


def _program(rank: int, ranks: int, backend: str, store: str, seconds: float) -> list[str]:
    return [sys.executable, "-m", "vqserve.preflight.rank", str(rank), str(ranks), backend, store, str(seconds)]


def _wait(started: Sequence[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    """Waits until all ranks have ended, one has failed, or the deadline; exit codes, None of those still running."""
    while True:
        codes = [process.poll() for process in started]
        if None not in codes or any(codes) or time.monotonic() >= deadline:
            return codes
        time.sleep(_POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a rank with all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _said(path: Path) -> dict[str, dict[str, Any]]:
    """What a rank has said, by step; the last line may be cut short."""
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            step = json.loads(line)
            found[step.pop("step")] = step
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
    return found


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""


def _problem(
    codes: Sequence[int | None], said: Sequence[Mapping[str, Any]], errors: Sequence[str], seconds: float
) -> str | None:
    """What went wrong, the rank that came least far first."""
    reached = [[step for step in STEPS if step in steps] for steps in said]
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed:
        rank = min(failed, key=lambda rank: len(reached[rank]))
        how = f"ended with {codes[rank]}" if codes[rank] != -signal.SIGKILL else "was killed, as when memory runs out"
        return f"rank {rank} {how}: {errors[rank] or 'it said nothing'}"
    if None in codes:
        worst = min(range(len(codes)), key=lambda rank: len(reached[rank]))
        others = [f"rank {worst}: {_WAITING_FOR[reached[worst][-1] if reached[worst] else None]}"]
        others += [
            f"rank {rank}: {_WAITING_FOR[reached[rank][-1] if reached[rank] else None]}"
            for rank in range(len(codes))
            if rank != worst and codes[rank] is None
        ]
        return f"nothing after {seconds:g} s; {'; '.join(others)}"
    wrong = [rank for rank, steps in enumerate(said) if not steps.get("reduced", {}).get("right")]
    if wrong:
        return f"rank {wrong[0]} got wrong numbers from the all-reduce"
    return None
