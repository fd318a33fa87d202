"""Compiles ahead, without a GPU, what the server would compile at its first start: `ahead.py ARCH`, e.g. `sm_120a`.

The kernels of vqserve go into its package, where they are looked for first. Triton's interface to the driver, which it
compiles with a C compiler, goes beside `image_cache.py`, which lets Triton find it in an image without one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.nvidia import driver
from triton.runtime import build, cache

from vqserve.kernels import moe, nvrtc
from vqserve.kernels.vq_gemm import cuda as gather
from vqserve.kernels.vq_moe import cuda as lut


def compile_kernels(arch: str) -> None:
    """Compiles whatever `compile_all` loads, by having it compile where it would load."""

    def compile_only(package: str, name: str, kernel: str, device: int, shared: int = 0, defines: Any = ()) -> None:
        nvrtc.compile_source(package, name, arch, defines)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        with mock.patch.multiple(gather, load_kernel=compile_only), mock.patch.multiple(lut, load_kernel=compile_only):
            moe.compile_all(torch.device("cuda", 0))
        built = Path(str(resources.files("vqserve.kernels"))) / "built"
        shutil.copytree(Path(folder) / "vqserve" / "kernels", built)
    for file in built.iterdir():
        file.chmod(0o644)


def compile_driver(target: Path) -> None:
    """Compiles what `CudaUtils` would, against a library that only has the name of the driver's."""
    source = (Path(driver.dirname) / "driver.c").read_text()
    key = hashlib.sha256((source + build.platform_key()).encode()).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder) / "libcuda.so.1"
        subprocess.run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null", "-o", stub], check=True)
        path = Path(folder) / "driver.c"
        path.write_text(source)
        libraries = [driver.libdevice_dir, folder]
        done = build._build("cuda_utils", str(path), folder, libraries, driver.include_dirs, driver.libraries, [])
        kept = target / cache._base32(key) / Path(done).name
        kept.parent.mkdir(parents=True)
        shutil.copyfile(done, kept)


if __name__ == "__main__":
    compile_kernels(sys.argv[1])
    compile_driver(Path(triton.__file__).parents[1] / "vqserve_image" / "triton")
