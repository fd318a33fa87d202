"""The plugin's operator, its registration, and vLLM's rotary operator that WORKAROUNDS.md is about."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_plugin import inside
from vllm_plugin.engine_process import EngineProcess


@pytest.mark.slow
def test_the_operator_is_the_reference_and_keeps_torchs_contract(engines: EngineProcess, seed: int) -> None:
    engines.call(inside.check_operator, seed)


@pytest.mark.slow
def test_the_plugin_may_be_registered_any_number_of_times(engines: EngineProcess) -> None:
    assert engines.call(inside.register_again) == ("VQServeConfig", 1)


def test_importing_the_plugin_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, vqserve.vllm_plugin; print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_rotary_op_is_still_wrong_for_heads_and_right_without(engines: EngineProcess) -> None:
    assert engines.call(inside.rotary_error, (7, 128)) < 1e-5
    error = engines.call(inside.rotary_error, (7, 2, 64))
    assert error > 0.1, "the op is right now: remove the workaround `rotary` of WORKAROUNDS.md"
