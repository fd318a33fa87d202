"""What the driver and the kernel say is read as they write it."""

from __future__ import annotations

from pathlib import Path

from preflight.machines import BUSES, PRODUCT, gpu_xml, log_xml, procfs, sysfs
from vqserve.preflight.node import (
    MIB,
    Driver,
    driver,
    free_bytes,
    heterogeneous_memory,
    iommu_of,
    parse_driver,
    redirecting_bridges,
    registry_words,
)


def parsed(text: str) -> Driver:
    found = parse_driver(text)
    assert found is not None
    return found


def test_the_drivers_xml_gives_every_gpu() -> None:
    found = parsed(log_xml())
    assert found.version == "580.95.05"
    assert [gpu.bus for gpu in found.gpus] == list(BUSES)
    first = found.gpus[0]
    assert (first.product, first.total, first.used, first.bar1) == (PRODUCT, 97887 * MIB, 3 * MIB, 131072 * MIB)
    assert (first.power, first.link, first.mig) == ((600.0, 600.0), (16, 16), False)


def test_what_a_card_does_not_say_is_unknown_and_not_wrong() -> None:
    gpu = parsed(log_xml(gpu_xml(width="N/A", power="N/A", mig="Enabled"))).gpus[0]
    assert (gpu.power, gpu.link, gpu.mig) == (None, None, True)


def test_a_tool_that_is_missing_fails_or_prints_no_xml_is_no_driver(tmp_path: Path) -> None:
    assert driver(str(tmp_path / "nvidia-smi")) is None
    assert driver("/bin/false") is None
    assert driver("/bin/echo") is None
    assert parse_driver("No devices were found") is None


def test_the_drivers_own_tool_is_asked_for_xml(tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    (tmp_path / "log.xml").write_text(log_xml())
    tool.write_text(f'#!/bin/sh\ntest "$1 $2" = "-q -x" && cat {tmp_path}/log.xml\n')
    tool.chmod(0o755)
    found = driver(str(tool))
    assert found == parsed(log_xml())


def test_the_kernels_word_for_the_iommu_is_that_of_the_gpus_group(tmp_path: Path) -> None:
    assert iommu_of(BUSES[0], sysfs(tmp_path / "a", "DMA-FQ")) == "DMA-FQ"
    assert iommu_of(BUSES[0], sysfs(tmp_path / "b", None)) is None
    assert iommu_of("0000:99:00.0", tmp_path / "a") is None


def test_bridges_that_redirect_are_found_in_their_second_capability(tmp_path: Path) -> None:
    assert redirecting_bridges(BUSES[1], sysfs(tmp_path / "on", None, redirect=True)) == ["0000:10:01.1"]
    assert redirecting_bridges(BUSES[1], sysfs(tmp_path / "off", None)) == []


def test_without_privileges_or_device_nothing_is_known_of_bridges(tmp_path: Path) -> None:
    assert redirecting_bridges(BUSES[0], sysfs(tmp_path / "sys", None, redirect=True, privileged=False)) is None
    assert redirecting_bridges("0000:99:00.0", tmp_path / "sys") is None


def test_settings_of_the_driver_are_read(tmp_path: Path) -> None:
    assert heterogeneous_memory(sysfs(tmp_path / "on", None, hmm="Y")) is True
    assert heterogeneous_memory(sysfs(tmp_path / "off", None)) is False
    assert heterogeneous_memory(tmp_path / "nothing") is None
    assert registry_words(procfs(tmp_path / "proc", "PeerMappingOverride=1;")) == "PeerMappingOverride=1;"
    assert registry_words(procfs(tmp_path / "plain")) == ""
    assert registry_words(tmp_path / "nothing") is None


def test_free_bytes_are_those_of_the_folders_file_system(tmp_path: Path) -> None:
    room = free_bytes(tmp_path)
    assert room is not None
    assert 0 < room[0] <= room[1]
    assert free_bytes(tmp_path / "nothing") is None
