"""Run in the image: loads what the server loads on sm_120, up to the driver, and compiles nothing; counts files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from unittest import mock

from triton.backends.nvidia import driver
from triton.runtime import build
from triton.runtime.cache import get_cache_manager

from vqserve.kernels import moe, nvrtc

if __name__ == "__main__":
    with mock.patch.object(nvrtc, "_compile", side_effect=AssertionError("not in the image")):
        cubins = moe.compile_ahead((12, 0))
    source = (Path(driver.dirname) / "driver.c").read_text()
    key = hashlib.sha256((source + build.platform_key()).encode()).hexdigest()
    found = get_cache_manager(key).get_file("cuda_utils.cpython-311-x86_64-linux-gnu.so")
    assert found, "Triton would look for a C compiler"
    print(len(cubins))  # noqa: T201 - the result
