"""Run in the image: loads what the server loads on sm_120, up to the driver, and compiles nothing; counts files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from unittest import mock

import torch
from triton.backends.nvidia import driver
from triton.runtime import build
from triton.runtime.cache import get_cache_manager

from vqserve.kernels import moe, nvrtc
from vqserve.kernels.vq_gemm import cuda as gather
from vqserve.kernels.vq_moe import cuda as lut


def load(package: str, name: str, kernel: str, device: int, shared: int = 0, defines: tuple[str, ...] = ()) -> None:
    cubins.add(nvrtc.compile_source(package, name, "sm_120a", defines))


if __name__ == "__main__":
    cubins: set[bytes] = set()
    with (
        mock.patch.multiple(gather, load_kernel=load),
        mock.patch.multiple(lut, load_kernel=load),
        mock.patch.object(nvrtc, "_compile", side_effect=AssertionError("not in the image")),
    ):
        moe.compile_all(torch.device("cuda", 0))
    source = (Path(driver.dirname) / "driver.c").read_text()
    key = hashlib.sha256((source + build.platform_key()).encode()).hexdigest()
    found = get_cache_manager(key).get_file("cuda_utils.cpython-311-x86_64-linux-gnu.so")
    assert found, "Triton would look for a C compiler"
    print(len(cubins))  # noqa: T201 - the result
