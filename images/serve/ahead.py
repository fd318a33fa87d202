"""Compiles ahead, without a GPU, what the server would compile at its first start: `ahead.py CAPABILITY`, e.g. `12.0`.

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

import triton
from triton.backends.nvidia import driver
from triton.runtime import build, cache

from vqserve.kernels import moe


def compile_kernels(capability: str) -> None:
    """Compiles into the package what it looks for there."""
    major, minor = map(int, capability.split("."))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        moe.compile_ahead((major, minor))
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
