"""Whether this machine has the memory for a model, before minutes of loading end in the kernel's killing the server."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from vqserve.format.errors import UsageError
from vqserve.format.memory import Memory

GIB = 1 << 30

SERVER_BYTES = 1 * GIB
"""The API server and the engine's core on a CPU: 0.96 GiB together, private bytes and their share of what is shared."""

RANK_BYTES = 1 * GIB
"""Each rank's process on a CPU without weights and KV cache: 0.57 GiB at rest, at its peak 0.99 (one rank) and 0.86
(two), with four prompts of 3,900 tokens at a time on a small model."""

_UTILIZATION = 0.92
"""vLLM's default of `--gpu-memory-utilization`."""

_TOOL_SECONDS = 30


def check_cpu(plan: Memory, context: int, kv_gib: int, available: int) -> None:
    """Checks that weights, KV caches and processes of a CPU server fit.

    Args:
        plan: What a rank holds.
        context: Tokens of `--max-model-len`.
        kv_gib: GiB of KV cache on each rank.
        available: Bytes.

    Raises:
        UsageError: They do not; the message has the numbers and the setting to change.
    """
    ranks, processes = plan.ranks, SERVER_BYTES + plan.ranks * RANK_BYTES
    weights = ranks * plan.weights.total
    needed = weights + ranks * kv_gib * GIB + processes
    if needed <= available:
        return
    room = max(0, available - weights - processes) // (ranks * GIB)
    tokens = room * GIB // plan.token_bytes
    if tokens >= context:
        remedy = f"set VLLM_CPU_KVCACHE_SPACE={room}"
    elif tokens:
        remedy = f"set VLLM_CPU_KVCACHE_SPACE={room} and --max-model-len {tokens}"
    else:
        fewer = "a smaller --tensor-parallel-size, " if ranks > 1 else ""
        remedy = f"not even 1 GiB of KV cache fits: free some, or use {fewer}fewer bits per weight or another machine"
    raise UsageError(
        f"too little memory: about {_gib(needed)} needed (weights {_gib(weights)}, KV cache {ranks} x {kv_gib} GiB, "
        f"processes {_gib(processes)}), {_gib(available)} available; {remedy}"
    )


def check_gpus(plan: Memory, context: int, passed: Sequence[str], totals: Sequence[int]) -> None:
    """Checks that weights and the KV cache of one full context fit on each GPU: all that is certain beforehand.

    Args:
        plan: What a rank holds.
        context: Tokens of `--max-model-len`.
        passed: Arguments for vLLM, which may say what share of a GPU's memory it may use.
        totals: Bytes of every GPU; none if they are not known.

    Raises:
        UsageError: They do not.
    """
    if len(totals) < plan.ranks:
        return
    utilization = _utilization(passed)
    total = sorted(totals, reverse=True)[plan.ranks - 1]
    weights, cache = plan.weights.total, context * plan.token_bytes
    if weights + cache > total * utilization:
        raise UsageError(
            f"too little GPU memory: {_gib(weights + cache)} needed on each of {plan.ranks} (weights {_gib(weights)}, "
            f"KV cache of {context} tokens {_gib(cache)}), {_gib(int(total * utilization))} allowed by "
            f"--gpu-memory-utilization {utilization:g} of {_gib(total)}; raise it, lower --max-model-len, or see what "
            "fits with `vqserve plan`"
        )


def _utilization(passed: Sequence[str]) -> float:
    """What the last `--gpu-memory-utilization` says, else vLLM's default; what is no number vLLM refuses by itself."""
    said = _UTILIZATION
    for word, after in zip(passed, [*passed, ""][1:], strict=True):
        option, equals, text = word.partition("=")
        if option.replace("_", "-") == "--gpu-memory-utilization":
            try:
                said = float(text if equals else after)
            except ValueError:
                continue
    return said


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that new processes can have: what the kernel calls available, or less if a control group leaves less."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text(encoding="ascii").splitlines())
    return min([int(fields["MemAvailable"].split()[0]) * 1024, *_left_by_groups(proc, cgroups)])


def _left_by_groups(proc: Path, cgroups: Path) -> list[int]:
    """What every control group that this process is in leaves; caches of files can be had back."""
    left = []
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, kinds = cgroups, ("memory.max", "memory.current", "inactive_file")
        if controllers:  # version 1
            root, kinds = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, usage, cached = kinds
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):  # in a container the path may be the host's, and only the root is there
            allowed, used = _read(root / group / limit).strip(), _read(root / group / usage).strip()
            stat = dict(line.split(None, 1) for line in _read(root / group / "memory.stat").splitlines())
            if allowed.isdecimal() and used.isdecimal():
                left.append(max(0, int(allowed) - int(used) + int(stat.get(cached, 0))))
    return left


def _read(path: Path) -> str:
    """A file of the kernel's; nothing if there is none."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def gpu_bytes() -> list[int]:
    """Memory of every GPU as the driver's own tool says; empty where there is none, or where it fails."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TOOL_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.strip() for line in done.stdout.splitlines()]
    return [int(line) * 2**20 for line in lines if line.isdecimal()]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
