"""Every kernel compiles for the chips it is meant for, without a GPU and without a CUDA toolkit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vqserve.format.errors import UsageError
from vqserve.kernels import moe, nvrtc
from vqserve.kernels.nvrtc import arch_of, compile_source
from vqserve.kernels.vq_gemm import cuda as gather
from vqserve.kernels.vq_moe import cuda as lut

SHARED_PER_BLOCK = 99 * 1024
REGISTERS, THREADS_PER_SM = 65536, 1536  # of a multiprocessor of sm_120


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _resources(cubin: bytes, folder: Path) -> dict[str, dict[str, int]]:
    """Per kernel what cuobjdump reports: REG, STACK, SHARED, LOCAL."""
    file = folder / "kernels.cubin"
    file.write_bytes(cubin)
    spec = find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        for name, usage in re.findall(r"Function (\w+):\n(.*)", report)
    }


def test_the_look_up_table_kernels_fit_sm_120_and_spill_nothing(tmp_path: Path) -> None:
    found = _resources(compile_source("vqserve.kernels.vq_moe", "lut.cu", "sm_120a"), tmp_path)
    dynamic = {"gate_up": (lut.SHARED, lut.THREADS), "down": (lut.SHARED, lut.THREADS), "finish": (0, 256)}
    assert found.keys() == dynamic.keys()
    for name, (shared, threads) in dynamic.items():
        usage = found[name]
        total = usage["SHARED"] + shared
        blocks = min(REGISTERS // (usage["REG"] * threads), THREADS_PER_SM // threads, 102400 // total)
        share = blocks * threads / THREADS_PER_SM
        text = f"{name}: {usage['REG']} registers, {total} bytes shared, {share:.0%} occupancy"
        print(text)  # noqa: T201 - these figures are a result
        assert total <= SHARED_PER_BLOCK
        assert usage["STACK"] == 0
        assert usage["LOCAL"] == 0
        assert blocks >= 1


@pytest.mark.parametrize("chip", [90, 120])
def test_the_triton_kernels_fit_and_spill_nothing_on_sm_120(chip: int) -> None:
    # In a process of its own: here Triton interprets.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parents[1] / "kernel_builds.py"), str(chip)]
    found = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert len(found) > 10
    for name, usage in found.items():
        print(f"sm_{chip} {name}: {usage['reg']} registers, {usage['shared']} bytes shared")  # noqa: T201
        assert usage["shared"] <= SHARED_PER_BLOCK
        assert chip != 120 or usage["stack"] == usage["local"] == 0


@pytest.mark.parametrize("tokens", gather.TOKENS)
def test_the_gathering_kernels_fit_sm_120_and_spill_nothing(tokens: int, tmp_path: Path) -> None:
    warps = gather.warps((12, 0))
    cubin = compile_source("vqserve.kernels.vq_gemm", "gather.cu", "sm_120a", gather.defines(tokens, warps))
    found = _resources(cubin, tmp_path)
    assert found.keys() == {"group", "to_half", "gate_up", "level", "down", "combine"}
    for name, usage in found.items():
        total = usage["SHARED"] + (gather.shared_bytes(tokens, warps) if name in ("gate_up", "down") else 0)
        print(f"{name}, {tokens} tokens: {usage['REG']} registers, {total} bytes shared")  # noqa: T201
        assert total <= SHARED_PER_BLOCK
        assert usage["STACK"] == usage["LOCAL"] == 0


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize(("package", "name"), [("vq_moe", "lut.cu"), ("vq_gemm", "gather.cu")])
def test_each_source_compiles_for_older_chips(package: str, name: str, capability: tuple[int, int]) -> None:
    assert compile_source(f"vqserve.kernels.{package}", name, arch_of(capability)).startswith(b"\x7fELF")


def test_a_second_compilation_takes_the_cached_cubin(tmp_path: Path) -> None:
    first = compile_source("vqserve.kernels.vq_moe", "lut.cu", "sm_120a")
    (cached,) = (tmp_path / "cache" / "vqserve" / "kernels").iterdir()
    assert cached.read_bytes() == first
    cached.write_bytes(b"what lies there")
    assert compile_source("vqserve.kernels.vq_moe", "lut.cu", "sm_120a") == b"what lies there"
    assert compile_source("vqserve.kernels.vq_moe", "lut.cu", "sm_120a", ["OTHER=1"]) == first


def test_what_an_image_brings_is_taken_before_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_source("vqserve.kernels.vq_moe", "lut.cu", "sm_120a")
    (cached,) = (tmp_path / "cache" / "vqserve" / "kernels").iterdir()
    package = shutil.copytree(Path(nvrtc.__file__).parent, tmp_path / "package")
    (package / "built").mkdir()
    (package / "built" / cached.name).write_bytes(b"what the image brings")
    installed = resources.files
    monkeypatch.setattr(resources, "files", lambda name: package if name == "vqserve.kernels" else installed(name))
    assert compile_source("vqserve.kernels.vq_moe", "lut.cu", "sm_120a") == b"what the image brings"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_what_is_compiled_ahead_is_all_that_is_loaded(
    capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(package: str, name: str, kernel: str, device: int, shared: int = 0, defines: tuple[str, ...] = ()) -> None:
        loaded.add(compile_source(package, name, arch_of(capability), defines))

    ahead, loaded = moe.compile_ahead(capability), set[bytes]()
    kept = set((tmp_path / "cache" / "vqserve" / "kernels").iterdir())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for kernels in (lut, gather):
        monkeypatch.setattr(kernels, "load_kernel", load)
    moe.compile_all(torch.device("cuda", 0))
    assert loaded == set(ahead)
    assert len(ahead) == 1 + len(gather.TOKENS)
    assert set((tmp_path / "cache" / "vqserve" / "kernels").iterdir()) == kept


def test_a_target_that_nvrtc_does_not_know_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"^lut\.cu: does not compile with .*sm_11\b") as error:
        compile_source("vqserve.kernels.vq_moe", "lut.cu", "sm_11")
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="set XDG_CACHE_HOME"):
        compile_source("vqserve.kernels.vq_moe", "lut.cu", "sm_120a")
