"""Machines that are not here: what their driver and their kernel say."""

from __future__ import annotations

import struct
from pathlib import Path

PRODUCT = "NVIDIA RTX PRO 6000 Blackwell Server Edition"
BUSES = ("0000:01:00.0", "0000:41:00.0")


def gpu_xml(
    bus: str = BUSES[0],
    product: str = PRODUCT,
    bar1: str = "131072 MiB",
    used: str = "3 MiB",
    width: str = "16x",
    power: str = "600.00 W",
    mig: str = "N/A",
) -> str:
    """One GPU as `nvidia-smi -q -x` describes it, as far as anybody looks."""
    return f"""
	<gpu id="0000{bus.upper()}">
		<product_name>{product}</product_name>
		<uuid>GPU-{bus}</uuid>
		<mig_mode><current_mig>{mig}</current_mig><pending_mig>{mig}</pending_mig></mig_mode>
		<pci><pci_gpu_link_info><link_widths>
			<max_link_width>16x</max_link_width><current_link_width>{width}</current_link_width>
		</link_widths></pci_gpu_link_info></pci>
		<fb_memory_usage><total>97887 MiB</total><reserved>637 MiB</reserved><used>{used}</used></fb_memory_usage>
		<bar1_memory_usage><total>{bar1}</total><used>2 MiB</used></bar1_memory_usage>
		<gpu_power_readings>
			<current_power_limit>{power}</current_power_limit><default_power_limit>600.00 W</default_power_limit>
		</gpu_power_readings>
	</gpu>"""


def log_xml(*gpus: str, driver: str = "580.95.05") -> str:
    """All that `nvidia-smi -q -x` says of a machine."""
    return f"""<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
	<driver_version>{driver}</driver_version>{"".join(gpus or (gpu_xml(), gpu_xml(BUSES[1])))}
</nvidia_smi_log>
"""


def sysfs(folder: Path, iommu: str | None, redirect: bool = False, privileged: bool = True, hmm: str = "N") -> Path:
    """A /sys in which each GPU sits below a bridge of its own."""
    devices = folder / "bus/pci/devices"
    devices.mkdir(parents=True)
    for number, bus in enumerate(BUSES):
        bridge = folder / f"devices/pci0000:{number}0/0000:{number}0:01.1"
        gpu = bridge / bus
        gpu.mkdir(parents=True)
        space = config_space(0b1_1101 if redirect else 0b0001)
        (bridge / "config").write_bytes(space if privileged else space[:64])
        (devices / bridge.name).symlink_to(bridge)
        (devices / bus).symlink_to(gpu)
        if iommu is not None:
            (gpu / "iommu_group").mkdir()
            (gpu / "iommu_group/type").write_text(f"{iommu}\n")
    parameters = folder / "module/nvidia_uvm/parameters"
    parameters.mkdir(parents=True)
    (parameters / "uvm_disable_hmm").write_text({"N": "Y\n", "Y": "N\n"}[hmm])
    return folder


def config_space(control: int) -> bytes:
    """Configuration space of a bridge with two extended capabilities, the second of them ACS."""
    space = bytearray(4096)
    struct.pack_into("<I", space, 0x100, 0x0001 | 2 << 16 | 0x150 << 20)  # advanced error reporting, then 0x150
    struct.pack_into("<IHH", space, 0x150, 0x000D | 1 << 16, 0x1F, control)
    return bytes(space)


def procfs(folder: Path, words: str = "") -> Path:
    """A /proc with the driver's parameters."""
    (folder / "driver/nvidia").mkdir(parents=True)
    (folder / "driver/nvidia/params").write_text(f'EnableMSI: 1\nRegistryDwords: "{words}"\nRmMsg: ""\n')
    return folder
