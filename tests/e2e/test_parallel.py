"""Two ranks as a user starts them, on vLLM's library for CPUs without AVX-512: one server for both, for its time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from e2e.asking import right_of_twelve
from e2e.conftest import serving, wait_for
from vllm_plugin.engine_process import WITHOUT_AVX512

pytestmark = pytest.mark.e2e


def test_two_ranks_without_avx512_calculate_and_say_that_the_spine_is_dequantized(
    demo_model: Path, tmp_path: Path
) -> None:
    options = ("--tensor-parallel-size", "2", "--", "--enable-expert-parallel")
    with serving(demo_model, tmp_path, *options, **WITHOUT_AVX512) as server:
        wait_for(server, "/health", 200)
        assert right_of_twelve(server) >= 11
    lines = [line for line in server.log.read_text(encoding="utf-8").splitlines() if "no 4-bit GEMM" in line]
    assert lines
    assert len({re.findall(r"pid=(\d+)", line)[0] for line in lines}) == len(lines), "once in a process"
    assert "28 layers are dequantized at load, to 10.0 MB of float32 instead of 1.3 MB" in lines[0]
