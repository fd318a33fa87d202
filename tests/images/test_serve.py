"""The image serve, as far as it can be judged without a GPU; FLAVOUR says which of its two tags."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from contracts.test_locks import pins
from images.containers import components, configuration, image, output_of

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

FLAVOUR = os.environ.get("FLAVOUR", "dense")
WITHOUT_NVCC = {"nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-cuda-nvcc", "nvidia-nvvm"}
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def name() -> str:
    return image("serve", f"-{FLAVOUR}")


def inside(name: str, script: str) -> str:
    """What a script of this folder prints in a container."""
    return output_of(name, "python", "/inside.py", options=(f"--volume={HERE / script}:/inside.py:ro",))


def test_what_serving_imports_can_be_imported(name: str) -> None:
    assert inside(name, "inside_imports.py").split()[-1] == "0.32.0"


def test_serve_knows_what_it_would_start(name: str, demo_model: Path) -> None:
    shown = output_of(name, "vqserve", "serve", "/model", "--print", options=(f"--volume={demo_model}:/model:ro",))
    assert "/opt/vqserve/bin/python -m vllm." in shown
    assert "--model /model" in shown


def test_vllms_extensions_hold_machine_code_for_sm_120(name: str) -> None:
    chips = {file: chips for file, *chips in map(str.split, inside(name, "inside_machine_code.py").splitlines())}
    for extension in ("_C_stable_libtorch", "_moe_C_stable_libtorch"):
        assert "sm_120" in chips[f"{extension}.abi3.so"]


def test_no_kernel_of_ours_has_to_be_compiled_on_sm_120(name: str) -> None:
    assert inside(name, "inside_kernels.py").split()[-1] == "5"


def test_the_flavour_has_its_compilers_and_no_others(name: str) -> None:
    script = 'for tool in cc gcc g++ nvcc "$CUDA_HOME/bin/nvcc"; do command -v "$tool" || true; done'
    found = {Path(line).name for line in output_of(name, "sh", "-c", script).split()}
    assert found == (set() if FLAVOUR == "dense" else {"cc", "gcc", "g++", "nvcc"})


def test_its_bill_of_materials_is_the_lock(name: str) -> None:
    found = components(name)
    assert found.pop("vqserve")
    left_out = WITHOUT_NVCC if FLAVOUR == "dense" else set()
    assert found == {package: version for package, version in pins("cuda.txt").items() if package not in left_out}


def test_it_runs_as_nobody_in_particular(name: str) -> None:
    assert configuration(name)["User"] == "10001:10001"
    assert not configuration(name).get("Entrypoint")
