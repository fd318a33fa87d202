"""What is judged, and how."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from preflight.machines import BUSES, gpu_xml, log_xml, procfs, sysfs
from vqserve.preflight import checks
from vqserve.preflight.checks import check_all_reduce, check_folders, check_gpus, check_paths
from vqserve.preflight.collective import AllReduce
from vqserve.preflight.findings import Finding, Verdict
from vqserve.preflight.node import Gpu, parse_driver


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def judged(text: str, wanted: int = 2, product: str | None = None) -> dict[str, Finding]:
    return by_name(check_gpus(parse_driver(text), wanted, product))


def gpus() -> tuple[Gpu, ...]:
    found = parse_driver(log_xml())
    assert found is not None
    return found.gpus


GOOD = AllReduce(None, 30e-6, 40e9, "2.31.1", True)


def test_a_good_pair_of_cards_is_all_right(tmp_path: Path) -> None:
    findings = [
        *check_gpus(parse_driver(log_xml()), 2, "RTX PRO 6000"),
        *check_paths(gpus(), sysfs(tmp_path / "sys", "identity"), procfs(tmp_path / "proc")),
        *check_all_reduce(GOOD, None, gpus()),
        *check_folders(tmp_path, tmp_path),
    ]
    assert {finding.verdict for finding in findings} == {Verdict.OK}
    assert not any(finding.remedy for finding in findings)


@pytest.mark.parametrize(
    ("text", "what", "verdict", "remedy"),
    [
        ("", "driver", Verdict.FAIL, "install the driver"),
        (log_xml(driver="570.133.20"), "driver", Verdict.FAIL, "upgrade the node's driver"),
        (log_xml(gpu_xml()), "GPUs", Verdict.FAIL, "nvidia.com/gpu: 2"),
        (log_xml(gpu_xml(product="NVIDIA L4"), gpu_xml()), "GPUs", Verdict.FAIL, "nvidia.com/gpu.product"),
        (log_xml(gpu_xml(bar1="256 MiB")), "GPU 0 BAR1", Verdict.WARN, "resizable BAR"),
        (log_xml(gpu_xml(used="40000 MiB")), "GPU 0 memory", Verdict.WARN, "another process"),
        (log_xml(gpu_xml(width="8x")), "GPU 0 PCIe", Verdict.WARN, "fewer lanes"),
        (log_xml(gpu_xml(mig="Enabled")), "GPU 0 instances", Verdict.WARN, "MIG off"),
    ],
)
def test_what_is_wrong_with_cards_comes_with_its_remedy(text: str, what: str, verdict: Verdict, remedy: str) -> None:
    finding = judged(text, product="RTX PRO 6000")[what]
    assert finding.verdict is verdict
    assert remedy in finding.remedy


def test_different_cards_are_warned_of_where_no_product_is_wanted() -> None:
    assert judged(log_xml(gpu_xml(product="NVIDIA L4"), gpu_xml()))["GPUs"].verdict is Verdict.WARN


def test_a_lower_power_limit_is_said_and_not_warned_of() -> None:
    finding = judged(log_xml(gpu_xml(power="300.00 W")), wanted=1)["GPU 0 power"]
    assert finding.verdict is Verdict.OK
    assert finding.found.startswith("300 of 600 W (")


def test_what_stands_between_cards_is_named(tmp_path: Path) -> None:
    found = by_name(check_paths(gpus(), sysfs(tmp_path / "sys", "DMA-FQ", redirect=True, hmm="Y"), tmp_path))
    assert BUSES[0] in found["IOMMU"].found
    assert "iommu=pt" in found["IOMMU"].remedy
    assert found["ACS"].found == "redirects at 0000:00:01.1, 0000:10:01.1"
    assert "uvm_disable_hmm=1" in found["nvidia_uvm"].remedy
    assert found["driver's registry"].verdict is Verdict.UNKNOWN


def test_what_only_root_may_read_is_unknown_and_says_how_to_look(tmp_path: Path) -> None:
    found = by_name(check_paths(gpus(), sysfs(tmp_path, None, privileged=False), tmp_path))
    assert found["ACS"].verdict is Verdict.UNKNOWN
    assert "lspci" in found["ACS"].remedy
    assert found["IOMMU"] == Finding("IOMMU", Verdict.OK, "off")


def test_a_hang_that_the_hosts_memory_cures_names_the_settings() -> None:
    [finding] = check_all_reduce(AllReduce("nothing after 120 s; rank 0: it hung"), AllReduce(None, 90e-6, 9e9), gpus())
    assert finding.verdict is Verdict.FAIL
    assert "90 us" in finding.remedy
    assert (finding.environment, finding.arguments) == (checks.NO_PEERS, checks.NO_PEERS_ARGUMENTS)


def test_a_hang_that_nothing_cures_says_both() -> None:
    [finding] = check_all_reduce(AllReduce("hung"), AllReduce("rank 1 ended with 1: boom"), gpus())
    assert (finding.found, finding.arguments) == ("hung", ())
    assert "boom" in finding.remedy
    [alone] = check_all_reduce(AllReduce("hung"), None, ())
    assert alone.verdict is Verdict.FAIL


@pytest.mark.parametrize("trial", [AllReduce(None, 242e-6, 40e9), AllReduce(None, 30e-6, 9e9)])
def test_a_slow_link_is_warned_of_on_gpus_only(trial: AllReduce) -> None:
    assert by_name(check_all_reduce(trial, None, gpus()))["all-reduce"].verdict is Verdict.WARN
    assert by_name(check_all_reduce(trial, None, ()))["all-reduce"].verdict is Verdict.OK


def test_cards_that_cannot_read_each_other_are_served_through_the_host() -> None:
    finding = by_name(check_all_reduce(AllReduce(None, 30e-6, 40e9, "2.31.0", False), None, gpus()))["peer access"]
    assert finding.arguments == ("--disable-custom-all-reduce",)


@pytest.mark.parametrize(
    ("version", "verdict"), [("2.26.5", Verdict.WARN), ("2.29.7", Verdict.WARN), ("2.31.0", Verdict.OK)]
)
def test_nccl_older_than_these_cards_want_is_warned_of(version: str, verdict: Verdict) -> None:
    assert by_name(check_all_reduce(AllReduce(None, 1e-6, 1e12, version), None, gpus()))["NCCL"].verdict is verdict


def test_other_cards_are_content_with_any_sound_nccl() -> None:
    found = parse_driver(log_xml(gpu_xml(product="NVIDIA H100 80GB HBM3")))
    assert found is not None
    for version, verdict in (("2.26.5", Verdict.WARN), ("2.29.7", Verdict.OK)):
        trial = AllReduce(None, 1e-6, 1e12, version)
        assert by_name(check_all_reduce(trial, None, found.gpus))["NCCL"].verdict is verdict


def test_little_shared_memory_and_no_room_for_kernels_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "free_bytes", lambda folder: (64 << 20, 64 << 20))
    found = by_name(check_folders(tmp_path / "not" / "yet", tmp_path))
    assert {finding.verdict for finding in found.values()} == {Verdict.WARN}
    assert "shm.size" in found["shared memory"].remedy
