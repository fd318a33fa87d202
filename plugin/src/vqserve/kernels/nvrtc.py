"""CUDA C++ compiled at load time by NVRTC, which CUDA's wheels bring: no toolkit, no nvcc, one cubin per chip.

A source is one `.cu` file of the package and what all share, `device.cuh`. Its cubin is kept in
`$XDG_CACHE_HOME/vqserve/kernels` (default `~/.cache`) under the hash of all that it depends on: both files, options,
NVRTC's version. An image brings cubins in the package's folder `built`, under the same names: those are read first.
Compiling needs no GPU; loading and launching take torch's current device and stream, and never synchronize.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vqserve.format.errors import UsageError

Argument: TypeAlias = "Tensor | ctypes._SimpleCData[Any] | None"
"""Of a kernel: tensors and None for pointers, ctypes numbers for the rest."""

OPTIONS = ("--std=c++17", "--device-as-default-execution-space")

_SHARED = "device.cuh"


def arch_of(capability: tuple[int, int]) -> str:
    """The target for a compute capability; from 9.0 on with the instructions of that chip alone (`a`)."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def compile_source(package: str, name: str, arch: str, defines: Sequence[str] = ()) -> bytes:
    """The cubin of the source `name` in `package`, from the image, from the cache or compiled now.

    Args:
        package: Package that holds the source, e.g. `vqserve.kernels.vq_moe`.
        name: File name of the source.
        arch: Target, e.g. `sm_120a`.
        defines: Macros, `NAME=VALUE` each.

    Raises:
        UsageError: NVRTC is missing or does not know the target, the source does not compile, or the cache cannot be
            written.
    """
    nvrtc = _nvrtc()
    source, shared = resources.files(package).joinpath(name).read_bytes(), _shared()
    options = [*OPTIONS, f"--gpu-architecture={arch}", *(f"--define-macro={define}" for define in defines)]
    version = _checked(nvrtc.nvrtcVersion(), "its version")
    key = hashlib.sha256(b"\0".join([source, shared, repr((options, version)).encode()])).hexdigest()
    file_name = f"{Path(name).stem}-{arch}-{key}.cubin"
    built = resources.files("vqserve.kernels").joinpath("built", file_name)
    if built.is_file():
        return built.read_bytes()
    path = _cache_folder() / file_name
    if path.is_file():
        return path.read_bytes()
    cubin = _compile(nvrtc, source, name, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)  # noqa: PTH105 - atomic: another process sees no file or a whole one
    except OSError as cause:
        raise UsageError(
            f"{path.parent}: cannot keep compiled kernels there ({cause.strerror}); "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from cause
    return cubin


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as cause:
        raise UsageError(
            "cannot compile kernels: cuda-bindings is not installed; install vqserve with its `cuda` extra"
        ) from cause
    return nvrtc


def _shared() -> bytes:
    return resources.files("vqserve.kernels").joinpath(_SHARED).read_bytes()


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "vqserve" / "kernels"


def _compile(nvrtc: Any, source: bytes, name: str, options: Sequence[str]) -> bytes:
    program = _checked(nvrtc.nvrtcCreateProgram(source, name.encode(), 1, [_shared()], [_SHARED.encode()]), name)
    try:
        result = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
        if int(result):
            log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program), name))
            nvrtc.nvrtcGetProgramLog(program, log)
            lines = log.decode(errors="replace").rstrip("\0\n").splitlines()
            first = next((line for line in lines if "error" in line), nvrtc.nvrtcGetErrorString(result)[1].decode())
            raise UsageError(f"{name}: does not compile with {' '.join(options)}: {first}")
        cubin = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program), name))
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(answer: tuple[Any, ...], what: str) -> Any:
    """What a call of `cuda.bindings` returned, without its error code.

    Raises:
        UsageError: The code is not 0.
    """
    if int(answer[0]):
        raise UsageError(f"{what}: CUDA answered {answer[0].name}; nvidia-smi shows the driver's version and the GPUs")
    rest = answer[1:]
    return rest[0] if len(rest) == 1 else rest


@dataclass(frozen=True)
class Kernel:
    """A kernel loaded on one device.

    Attributes:
        name: As in the source.
        function: The driver's handle.
        shared: Bytes of dynamic shared memory per block.
    """

    name: str
    function: Any
    shared: int

    def launch(self, grid: int, block: int, arguments: Sequence[Argument]) -> None:
        """Puts the kernel into torch's current stream.

        It may start while the kernel before it still runs (programmatic dependent launch): its source says where it
        waits for the results of that one.

        Args:
            grid: Blocks.
            block: Threads per block.
            arguments: In the kernel's order.
        """
        from cuda.bindings import driver

        values = [
            ctypes.c_void_p(a.data_ptr() if isinstance(a, Tensor) else None)
            if a is None or isinstance(a, Tensor)
            else a
            for a in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = self.shared
        config.hStream = torch.cuda.current_stream().cuda_stream
        config.attrs, config.numAttrs = [_early_start()], 1
        _checked(driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0), f"kernel {self.name}")


@cache
def _early_start() -> Any:
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


@cache
def load_kernel(
    package: str, name: str, kernel: str, device: int, shared: int = 0, defines: tuple[str, ...] = ()
) -> Kernel:
    """The kernel `kernel` of a source, compiled for and loaded on CUDA device `device`; kept for the next call.

    Raises:
        UsageError: As `compile_source`, or the driver refuses the kernel.
    """
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes torch's context current
        module = _module(package, name, device, defines)
        from cuda.bindings import driver

        function = _checked(driver.cuModuleGetFunction(module, kernel.encode()), f"{name}: kernel {kernel}")
        attributes = driver.CUfunction_attribute
        if shared:
            at = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, at, shared), f"{name}: {shared} bytes of shared memory")
            carveout = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            _checked(driver.cuFuncSetAttribute(function, carveout, 100), name)
        return Kernel(kernel, function, shared)


@cache
def _module(package: str, name: str, device: int, defines: tuple[str, ...]) -> Any:
    from cuda.bindings import driver

    cubin = compile_source(package, name, arch_of(torch.cuda.get_device_capability(device)), defines)
    return _checked(driver.cuModuleLoadData(cubin), name)
