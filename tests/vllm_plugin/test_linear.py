"""Where vLLM has no 4-bit GEMM, the spine is served as exactly the weights it stands for, and says so: see e2e too."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from random_checkpoint import read_tensors
from vllm_plugin import inside
from vllm_plugin.engine_process import HAS_4_BIT_GEMM, EngineProcess, Question
from vllm_plugin.test_logits import FP32, HALF, difference
from vqserve.reference.gptq import dequantize_gptq

FUSED = {"fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"), "gate_up_proj": ("gate_proj", "up_proj")}
SPLIT = {"gate_up_proj": 0, "q_b_proj": 0, "o_proj": 1, "down_proj": 1}
"""The axis of [N, K] along which ranks share a layer; others are every rank's."""

TOLERANCE = {**HALF, "float32": FP32}

pytestmark = pytest.mark.slow


def expected(checkpoint: Path, name: str, rank: int, ranks: int, dtype: torch.dtype) -> Tensor:
    """What a rank's layer should multiply by, from the checkpoint's tensors."""
    tensors, (stem, _, leaf) = read_tensors(checkpoint), name.rpartition(".")
    parts = []
    for part in FUSED.get(leaf, (leaf,)):
        weight = dequantize_gptq(tensors[f"{stem}.{part}.qweight"], tensors[f"{stem}.{part}.scales"], dtype)
        parts.append(weight.chunk(ranks, SPLIT[leaf])[rank] if leaf in SPLIT else weight)
    return torch.cat(parts)


@pytest.mark.parametrize(("ranks", "dtype"), [(1, torch.float16), (1, torch.float32), (2, torch.bfloat16)])
def test_each_rank_multiplies_by_the_weights_of_the_reference(
    ranks: int,
    dtype: torch.dtype,
    engines_without_avx512: EngineProcess,
    engines: EngineProcess,
    unrouted: Path,
    unrouted_plain: Path,
    prompts: list[list[int]],
) -> None:
    name = str(dtype).removeprefix("torch.")
    options = {"tensor_parallel_size": ranks}
    question = Question(unrouted, prompts, name, inspect=inside.spine_weights, options=options)
    ours, held = engines_without_avx512.ask(question)
    assert len(held) == ranks
    for rank, weights in enumerate(held):
        # Attention has 3 layers of 4 bit, dense and shared MLPs 2, in each of 4 layers.
        assert len(weights) == 20
        for layer, weight in weights.items():
            assert torch.equal(weight, expected(unrouted, layer, rank, ranks, dtype)), layer
    theirs, _ = engines.ask(Question(unrouted_plain, prompts, name))
    assert difference(ours, theirs) < TOLERANCE[name]


def test_in_float32_the_spine_is_dequantized_on_any_cpu(
    engines: EngineProcess, unrouted: Path, unrouted_plain: Path, prompts: list[list[int]]
) -> None:
    ours, [weights] = engines.ask(Question(unrouted, prompts, inspect=inside.spine_weights))
    assert len(weights) == 20
    assert difference(ours, engines.ask(Question(unrouted_plain, prompts))[0]) < FP32


@pytest.mark.parametrize(
    ("library", "dtype", "setting", "reason"),
    [
        ("any", "float32", None, "vLLM's 4-bit GEMM takes no float32"),
        ("any", "float32", "packed", "VQSERVE_SPINE=packed: vLLM's 4-bit GEMM takes no float32; set it to"),
        ("avx2", "bfloat16", None, "vLLM has no 4-bit GEMM for CPUs without AVX-512"),
        ("avx2", "bfloat16", "packed", "VQSERVE_SPINE=packed: vLLM has no 4-bit GEMM"),
        ("any", "bfloat16", "4bit", "VQSERVE_SPINE=4bit: expected packed or dequantized"),
    ],
)
def test_why_the_spine_is_dequantized_or_why_it_cannot_stay_packed(
    library: str,
    dtype: str,
    setting: str | None,
    reason: str,
    engines: EngineProcess,
    engines_without_avx512: EngineProcess,
) -> None:
    process = engines_without_avx512 if library == "avx2" else engines
    found = process.call(inside.why_dequantized, dtype, setting)
    assert found.startswith(reason) or (dtype == "float32" and "without AVX-512" in found)


def test_with_a_4_bit_gemm_the_setting_decides(engines: EngineProcess) -> None:
    lacking = "vLLM has no 4-bit GEMM for CPUs without AVX-512"
    assert engines.call(inside.why_dequantized, "bfloat16", None) == (None if HAS_4_BIT_GEMM else lacking)
    forced = engines.call(inside.why_dequantized, "bfloat16", "dequantized")
    assert forced == ("VQSERVE_SPINE asks for it" if HAS_4_BIT_GEMM else lacking)


def test_a_dequantized_spine_can_be_loaded_anew_while_serving(
    engines_without_avx512: EngineProcess, unrouted: Path, prompts: list[list[int]]
) -> None:
    reload = partial(inside.reload_from, unrouted, prompts[1])
    [before], reloaded = engines_without_avx512.ask(
        Question(unrouted, prompts[1:2], "bfloat16", generate=1, inspect=reload)
    )
    assert torch.equal(reloaded, before.logits[0])
