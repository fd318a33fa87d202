"""How this machine's CPU serves best, and which of its cores each rank gets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from vqserve.format.errors import UsageError
from vqserve.settings import SPINE, Spine, wanted_spine


@dataclass(frozen=True)
class Cpu:
    """How a CPU serves best.

    Attributes:
        spine: Whether the 4-bit layers stay packed.
        dtype: Of weights and activations: float32, or vLLM's choice.
        avx512: Whether it has AVX-512, and so which of its libraries vLLM takes.
    """

    spine: Spine
    dtype: Literal["auto", "float32"]
    avx512: bool


def find_cpu() -> Cpu:
    """How this machine's CPU serves best, asked as vLLM asks when it chooses one of its libraries.

    Without instructions for bf16, torch's products in it take 5 (16 rows) to 16 (256 rows) times as long as in float32.
    On the demo, a 2-core EPYC with AVX2: 16 streams 397 tok/s in float32 against 249, a prompt of 2,000 tokens 1.4 s
    against 2.4.

    Raises:
        UsageError: It is too old for vLLM, or the environment asks for what it cannot do.
    """
    import torch  # two seconds: not for `--help`

    can = torch.cpu.get_capabilities()
    if not can.get("avx2"):
        raise UsageError("this CPU has no AVX2, without which vLLM's CPU build does not run; serve on another machine")
    fast = bool(can.get("avx512_bf16"))
    spine = wanted_spine() or ("packed" if fast else "dequantized")
    if spine == "packed" and not can.get("avx512_f"):
        raise UsageError(f"{SPINE}=packed: vLLM has no 4-bit GEMM for CPUs without AVX-512; unset it")
    dtype: Literal["auto", "float32"] = "float32" if spine == "dequantized" and not fast else "auto"
    return Cpu(spine, dtype, bool(can.get("avx512_f")))


def cores_of_ranks(ranks: int) -> str:
    """Each rank's share of the CPU cores as vLLM writes it, e.g. `0,1|2,3`; by itself it wants a NUMA node per rank."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // ranks
    return "|".join(",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(ranks))
