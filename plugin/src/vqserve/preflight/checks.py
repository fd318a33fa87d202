"""What is judged, one function per line or group of lines of the table.

Limits that are no arithmetic come from operators of RTX PRO 6000 pairs (github.com/local-inference-lab/rtx6kpro,
`hardware/pcie-bandwidth.md`), NVIDIA/nccl#1999 and vllm#51513.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vqserve.preflight.collective import AllReduce
from vqserve.preflight.findings import Finding, Verdict
from vqserve.preflight.node import (
    MIB,
    Driver,
    Gpu,
    free_bytes,
    heterogeneous_memory,
    iommu_of,
    redirecting_bridges,
    registry_words,
)
from vqserve.tables import gib

NO_PEERS = {"NCCL_P2P_DISABLE": "1"}
NO_PEERS_ARGUMENTS = ("--disable-custom-all-reduce",)
"""How two GPUs are served that must not read each other's memory: through the host's."""
_IN_THE_CHART = "(values: engine.pcie: noP2P)"

DRIVER = (580, 65)
"""The first that runs CUDA 13.0, which torch 2.13 is built with (CUDA 13.0 release notes, table 3)."""
NCCL_SOUND = (2, 27)
"""2.26 has illegal memory accesses."""
NCCL_ADVISED = (2, 31)
"""What operators of RTX PRO 6000 pairs run."""
SHARED_BYTES = 1 << 30
"""Of /dev/shm, which is 64 MiB in a pod that does not ask for more; NCCL without peer access and vLLM use it."""
CACHE_BYTES = 2 << 30
"""Of the folder for compiled kernels."""
IDLE_BYTES = 1 << 30
"""Of a GPU's memory in use before anything is served."""
LATENCY = 100e-6
"""Seconds for one token's hidden state; 25 us are usual, 242 were seen where peers' loads go through the host."""
BANDWIDTH = 20e9
"""Bytes per second; 40e9 are usual between PCIe 5.0 cards."""

_PRO_6000 = "RTX PRO 6000"


def check_gpus(driver: Driver | None, wanted: int, product: str | None) -> Iterator[Finding]:
    """Driver, number and kind of the GPUs.

    Args:
        driver: What it says, or None if it does not.
        wanted: GPUs to serve with.
        product: A regular expression that their names have to match.
    """
    if driver is None:
        remedy = "install the driver (GPU Operator), and ask for nvidia.com/gpu in the pod's resources"
        yield Finding("driver", Verdict.FAIL, "nvidia-smi is missing or fails", remedy)
        return
    version = tuple(int(number) for number in re.findall("[0-9]+", driver.version)[:2])
    ok = version >= DRIVER
    remedy = f"CUDA 13.0 needs {DRIVER[0]}.{DRIVER[1]} or newer: upgrade the node's driver"
    yield Finding("driver", Verdict.OK if ok else Verdict.FAIL, driver.version, "" if ok else remedy)
    names = sorted({gpu.product for gpu in driver.gpus})
    found = f"{len(driver.gpus)} x {' and '.join(names)}" if names else "none"
    if len(driver.gpus) < wanted:
        remedy = f"{wanted} are needed: ask for nvidia.com/gpu: {wanted}, or serve with fewer ranks"
        yield Finding("GPUs", Verdict.FAIL, found, remedy)
    elif product and not all(re.search(product, name) for name in names):
        yield Finding("GPUs", Verdict.FAIL, found, f"{product} is wanted: select nodes by nvidia.com/gpu.product")
    elif len(names) > 1:
        yield Finding("GPUs", Verdict.WARN, found, "ranks on different cards run at the slowest one's pace")
    else:
        yield Finding("GPUs", Verdict.OK, found)
    for number, gpu in enumerate(driver.gpus):
        yield from _check_gpu(f"GPU {number}", gpu)


def _check_gpu(name: str, gpu: Gpu) -> Iterator[Finding]:
    if gpu.mig:
        remedy = "ranks on instances cannot reach each other: turn MIG off (nvidia-smi -mig 0)"
        yield Finding(f"{name} instances", Verdict.WARN, "MIG is on", remedy)
    busy = gpu.used > IDLE_BYTES
    remedy = "another process holds some: end it, or lower --gpu-memory-utilization" if busy else ""
    found = f"{gib(gpu.total)}, {gib(gpu.used)} in use"
    yield Finding(f"{name} memory", Verdict.WARN if busy else Verdict.OK, found, remedy)
    if gpu.bar1 * 2 < gpu.total:
        remedy = "turn on resizable BAR and above 4G decoding in the firmware, or peers reach it only piecewise"
        yield Finding(f"{name} BAR1", Verdict.WARN, f"{gpu.bar1 // MIB} MiB", remedy)
    else:
        yield Finding(f"{name} BAR1", Verdict.OK, f"{gpu.bar1 // MIB} MiB")
    if gpu.link is not None:
        narrow = gpu.link[0] < gpu.link[1]
        remedy = "the slot or riser has fewer lanes than the card: move it" if narrow else ""
        verdict = Verdict.WARN if narrow else Verdict.OK
        yield Finding(f"{name} PCIe", verdict, f"{gpu.link[0]} of {gpu.link[1]} lanes", remedy)
    if gpu.power is not None:
        now, usual = gpu.power
        note = " (300 W instead of 600 cost a single user about 4 %)" if now < usual else ""
        yield Finding(f"{name} power", Verdict.OK, f"{now:.0f} of {usual:.0f} W{note}")


def check_paths(gpus: Sequence[Gpu], sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> Iterator[Finding]:
    """What stands between GPUs that reduce with each other; of interest to more than one rank.

    Args:
        gpus: Those that serve.
        sys: Where sysfs is.
        proc: Where procfs is.
    """
    kinds = {gpu.bus: iommu_of(gpu.bus, sys) for gpu in gpus}
    translated = [bus for bus, kind in kinds.items() if kind is not None and kind.startswith("DMA")]
    if translated:
        remedy = "ranks may hang: boot with iommu=pt (or amd_iommu=off / intel_iommu=off)"
        yield Finding("IOMMU", Verdict.WARN, f"translates for {', '.join(translated)}", remedy)
    else:
        how = sorted({kind for kind in kinds.values() if kind is not None})
        yield Finding("IOMMU", Verdict.OK, " and ".join(how) or "off")
    bridges = [redirecting_bridges(gpu.bus, sys) for gpu in gpus]
    redirecting = sorted({bridge for found in bridges for bridge in found or ()})
    if redirecting:
        remedy = "traffic between the GPUs takes the way through the CPU: turn ACS off in the firmware or with setpci"
        yield Finding("ACS", Verdict.WARN, f"redirects at {', '.join(redirecting)}", remedy)
    elif None in bridges:
        remedy = "as root on the node: lspci -vvv | grep ACSCtl; ReqRedir+ should not be there"
        yield Finding("ACS", Verdict.UNKNOWN, "only root may read it", remedy)
    else:
        yield Finding("ACS", Verdict.OK, "no bridge redirects")
    managed = heterogeneous_memory(sys)
    if managed:
        remedy = "NCCL may lock up: options nvidia_uvm uvm_disable_hmm=1 in /etc/modprobe.d, then reboot"
        yield Finding("nvidia_uvm", Verdict.WARN, "HMM is on", remedy)
    else:
        yield Finding(
            "nvidia_uvm", *((Verdict.UNKNOWN, "not readable") if managed is None else (Verdict.OK, "HMM off"))
        )
    words = registry_words(proc)
    if words is None:
        yield Finding("driver's registry", Verdict.UNKNOWN, "not readable")
    else:
        yield Finding("driver's registry", Verdict.OK, words or "no settings")


def check_all_reduce(trial: AllReduce, without_peers: AllReduce | None, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """How the trial went.

    Args:
        trial: As the ranks would serve.
        without_peers: The same through the host's memory, tried if the first went wrong on GPUs.
        gpus: Those that serve; none on CPUs.
    """
    if trial.problem is not None:
        yield _failed(trial.problem, without_peers)
    else:
        assert trial.latency is not None
        assert trial.bandwidth is not None
        slow = bool(gpus) and (trial.latency > LATENCY or trial.bandwidth < BANDWIDTH)
        remedy = ""
        if slow:
            remedy = "look at IOMMU, ACS and BAR1 above, and at peer settings in NVreg_RegistryDwords"
        found = f"{1e6 * trial.latency:.0f} us for 12 KiB, {trial.bandwidth / 1e9:.1f} GB/s for 64 MiB"
        yield Finding("all-reduce", Verdict.WARN if slow else Verdict.OK, found, remedy)
    if trial.peers is False:
        remedy = f"they reduce through the host's memory, soundly only without custom all-reduce {_IN_THE_CHART}"
        yield Finding(
            "peer access", Verdict.WARN, "the GPUs cannot read each other", remedy, NO_PEERS, NO_PEERS_ARGUMENTS
        )
    elif trial.peers:
        yield Finding("peer access", Verdict.OK, "between all GPUs")
    if trial.nccl is not None:
        yield _nccl(trial.nccl, any(_PRO_6000 in gpu.product for gpu in gpus))


def _failed(problem: str, without_peers: AllReduce | None) -> Finding:
    if without_peers is None:
        return Finding("all-reduce", Verdict.FAIL, problem, "ranks on this machine cannot work together")
    if without_peers.problem is not None:
        remedy = f"nor does it work through the host's memory: {without_peers.problem}"
        return Finding("all-reduce", Verdict.FAIL, problem, remedy)
    assert without_peers.latency is not None
    cost = f"{1e6 * without_peers.latency:.0f} us for 12 KiB"
    remedy = f"works through the host's memory, {cost}: use the settings below {_IN_THE_CHART}"
    return Finding("all-reduce", Verdict.FAIL, problem, remedy, NO_PEERS, NO_PEERS_ARGUMENTS)


def _nccl(version: str, pro: bool) -> Finding:
    numbers = tuple(int(number) for number in version.split(".")[:2])
    least = NCCL_ADVISED if pro else NCCL_SOUND
    if numbers >= least:
        return Finding("NCCL", Verdict.OK, version)
    remedy = f"{least[0]}.{least[1]} is advised: build the image with --build-arg NCCL_VERSION=..."
    return Finding("NCCL", Verdict.WARN, version, remedy)


def check_folders(cache: Path, shared: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Shared memory, and room for compiled kernels.

    Args:
        cache: Where they go.
        shared: Where shared memory is.
    """
    room = free_bytes(shared)
    if room is None or room[0] < SHARED_BYTES:
        remedy = "a memory emptyDir at /dev/shm (values: shm.size), or --shm-size with podman and docker"
        yield Finding("shared memory", Verdict.WARN, "none" if room is None else f"{gib(room[0])} free", remedy)
    else:
        yield Finding("shared memory", Verdict.OK, f"{gib(room[0])} free")
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    room = free_bytes(there)
    if room is None or room[0] < CACHE_BYTES:
        found = f"{gib(room[0])} free for {cache}" if room else f"{cache}: unknown"
        yield Finding("disk", Verdict.WARN, found, "compiled kernels go there: free some, or mount a volume")
    else:
        yield Finding("disk", Verdict.OK, f"{gib(room[0])} free for {cache}")
