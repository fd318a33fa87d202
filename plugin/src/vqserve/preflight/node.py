"""What the kernel and NVIDIA's driver say of this machine, read from inside a container as well as outside.

Nothing here needs privileges; what only root may read (the ACS bits of PCI bridges) is None without them.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

MIB = 1 << 20

_TOOL_SECONDS = 60

_ACS_CAPABILITY = 0x000D
_ACS_REDIRECTS = 0b0001_1100
"""P2P request redirect, P2P completion redirect, upstream forwarding (PCI Express Base Specification, ACS control)."""
_EXTENDED_SPACE = 0x100
_CONFIG_SPACE = 4096


@dataclass(frozen=True)
class Gpu:
    """One GPU, as `nvidia-smi -q -x` describes it.

    Attributes:
        product: Its name.
        uuid: Its identity.
        bus: PCI address as sysfs writes it, such as `0000:01:00.0`.
        total: Bytes of memory.
        used: Bytes of it in use.
        bar1: Bytes of the window through which the CPU and other GPUs reach its memory.
        power: Watts it may draw, and watts it may draw by default; None where it does not say.
        link: PCIe lanes in use, and lanes it has; None where it does not say.
        mig: Whether it is cut into instances.
    """

    product: str
    uuid: str
    bus: str
    total: int
    used: int
    bar1: int
    power: tuple[float, float] | None
    link: tuple[int, int] | None
    mig: bool


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver and the GPUs that this process may use.

    Attributes:
        version: Such as `580.65.06`.
        gpus: In the driver's order.
    """

    version: str
    gpus: tuple[Gpu, ...]


def driver(command: str = "nvidia-smi") -> Driver | None:
    """Asks the driver's own tool; None where there is no driver, or it does not answer within a minute."""
    try:
        done = subprocess.run([command, "-q", "-x"], capture_output=True, text=True, check=True, timeout=_TOOL_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_driver(done.stdout)


def parse_driver(text: str) -> Driver | None:
    """Reads the XML of `nvidia-smi -q -x`; None if it is none."""
    try:
        log = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None
    return Driver(log.findtext("driver_version", ""), tuple(_gpu(gpu) for gpu in log.findall("gpu")))


def _gpu(gpu: ElementTree.Element) -> Gpu:
    power = _numbers(gpu, "gpu_power_readings/current_power_limit", "gpu_power_readings/default_power_limit")
    widths = "pci/pci_gpu_link_info/link_widths"
    link = _numbers(gpu, f"{widths}/current_link_width", f"{widths}/max_link_width")
    return Gpu(
        product=gpu.findtext("product_name", "unknown"),
        uuid=gpu.findtext("uuid", ""),
        bus=gpu.get("id", "").lower()[-12:],
        total=_mib(gpu, "fb_memory_usage/total"),
        used=_mib(gpu, "fb_memory_usage/used"),
        bar1=_mib(gpu, "bar1_memory_usage/total"),
        power=(power[0], power[1]) if len(power) == 2 else None,
        link=(int(link[0]), int(link[1])) if len(link) == 2 else None,
        mig=gpu.findtext("mig_mode/current_mig", "N/A") == "Enabled",
    )


def _numbers(gpu: ElementTree.Element, *paths: str) -> list[float]:
    """The numbers at some places, units left out; fewer if it says no number at one of them."""
    found = (re.match(r"[0-9.]+", gpu.findtext(path, "")) for path in paths)
    return [float(match[0]) for match in found if match]


def _mib(gpu: ElementTree.Element, path: str) -> int:
    return int(sum(_numbers(gpu, path))) * MIB


def iommu_of(bus: str, sys: Path = Path("/sys")) -> str | None:
    """How the IOMMU treats a PCI device: the kernel's word, such as `identity` or `DMA-FQ`; None if it has no group."""
    return _line(sys / "bus/pci/devices" / bus / "iommu_group/type")


def redirecting_bridges(bus: str, sys: Path = Path("/sys")) -> list[str] | None:
    """PCI bridges above a device that send traffic between devices to the root complex (ACS).

    Args:
        bus: The device's address.
        sys: Where sysfs is.

    Returns:
        Their addresses; None if one of them cannot be read, as without privileges, or there is no such device.
    """
    device = sys / "bus/pci/devices" / bus
    if not device.exists():
        return None
    found = []
    for part in device.resolve().parent.parts:
        if re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", part) is None:
            continue
        space = _bytes(sys / "bus/pci/devices" / part / "config")
        if len(space) < _CONFIG_SPACE:
            return None
        if any(control & _ACS_REDIRECTS for control in _acs_controls(space)):
            found.append(part)
    return found


def _acs_controls(space: bytes) -> Iterator[int]:
    """The control register of every ACS capability in a device's configuration space."""
    at, seen = _EXTENDED_SPACE, set[int]()
    while _EXTENDED_SPACE <= at <= _CONFIG_SPACE - 8 and at not in seen:
        seen.add(at)
        header, _, control = struct.unpack_from("<IHH", space, at)
        if header & 0xFFFF == _ACS_CAPABILITY:
            yield control
        at = header >> 20 & ~3


def heterogeneous_memory(sys: Path = Path("/sys")) -> bool | None:
    """Whether the driver's heterogeneous memory management is on; None where there is no driver to ask."""
    disabled = _line(sys / "module/nvidia_uvm/parameters/uvm_disable_hmm")
    return None if disabled is None else disabled not in ("Y", "1")


def registry_words(proc: Path = Path("/proc")) -> str | None:
    """The driver's `RegistryDwords`, where settings for peer access are; None where there is no driver to ask."""
    for line in _bytes(proc / "driver/nvidia/params").decode(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == "RegistryDwords":
            return value.strip().strip('"')
    return None


def free_bytes(folder: Path) -> tuple[int, int] | None:
    """Bytes free for this process in a folder's file system, and bytes it has in all; None if there is no folder."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def _line(path: Path) -> str | None:
    return _bytes(path).decode(errors="replace").strip() or None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
