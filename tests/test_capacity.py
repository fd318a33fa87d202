"""Whether a model fits is known before it is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from random_parent import CONFIG
from vqserve.capacity import GIB, RANK_BYTES, SERVER_BYTES, available_bytes, check_cpu, check_gpus, gpu_bytes
from vqserve.checkpoint.assume import assumed
from vqserve.cli import main
from vqserve.format.errors import UsageError
from vqserve.format.memory import memory

ENCODED = assumed(CONFIG, {"a": 0.5, "d": 0.5})
CPU = memory(ENCODED, platform="cpu")


def written(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="ascii")


def machine(folder: Path, groups: str, available_kib: int = 4 << 20) -> tuple[Path, Path]:
    """A /proc and an empty /sys/fs/cgroup."""
    written(folder / "proc", meminfo=f"MemTotal: 9999999 kB\nMemAvailable:  {available_kib} kB\nHugePages_Total: 0\n")
    written(folder / "proc" / "self", cgroup=groups)
    return folder / "proc", folder / "cgroup"


def test_this_machine_has_memory() -> None:
    assert 0 < available_bytes() < 1 << 50


def test_without_control_groups_the_kernels_number_counts(tmp_path: Path) -> None:
    assert available_bytes(*machine(tmp_path, "0::/\n")) == 4 * GIB


def test_a_group_and_the_groups_above_it_limit_and_cached_files_are_free(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "0::/pods/one\n")
    written(groups / "pods", memory__max="max\n", memory__current="5\n", memory__stat="inactive_file 0\n")
    inner = groups / "pods" / "one"
    written(inner, memory__max=f"{3 * GIB}\n", memory__current=f"{2 * GIB}\n", memory__stat="anon 7\ninactive_file 9\n")
    assert available_bytes(proc, groups) == GIB + 9
    written(groups / "pods", memory__max=f"{2 * GIB}\n", memory__current=f"{2 * GIB}\n")
    assert available_bytes(proc, groups) == 0


def test_inside_a_container_the_root_of_the_groups_is_its_own(tmp_path: Path) -> None:
    for number, groups in enumerate(("0::/\n", "0::/hosts/name/for/it\n")):
        proc, root = machine(tmp_path / str(number), groups)
        written(root, memory__max=f"{GIB}\n", memory__current="0\n", memory__stat="inactive_file 0\n")
        assert available_bytes(proc, root) == GIB


def test_version_1_of_control_groups_limits_too(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "5:devices:/x\n4:memory:/job\n1:name=systemd:/\n0::/\n")
    written(groups / "memory", memory__limit_in_bytes=f"{(1 << 63) - 4096}\n", memory__usage_in_bytes="1\n")
    written(
        groups / "memory" / "job",
        memory__limit_in_bytes=f"{2 * GIB}\n",
        memory__usage_in_bytes=f"{GIB}\n",
        memory__stat="inactive_file 1\ntotal_inactive_file 5\n",
    )
    assert available_bytes(proc, groups) == GIB + 5


def test_what_fits_is_not_refused_and_a_byte_less_is() -> None:
    for ranks in (1, 2):
        plan = memory(ENCODED, ranks=ranks, platform="cpu")
        needed = SERVER_BYTES + ranks * (plan.weights.total + 2 * GIB + RANK_BYTES)
        check_cpu(plan, 4096, 2, needed)
        with pytest.raises(UsageError, match=rf"KV cache {ranks} x 2 GiB.* set VLLM_CPU_KVCACHE_SPACE=1$"):
            check_cpu(plan, 4096, 2, needed - 1)


def test_a_context_that_leaves_no_room_is_told_how_long_it_may_be() -> None:
    wide = memory({**ENCODED, "max_position_embeddings": 1 << 20}, platform="cpu")
    available = SERVER_BYTES + RANK_BYTES + wide.weights.total + GIB
    with pytest.raises(UsageError) as error:
        check_cpu(wide, 1 << 20, 9, available)
    found = re.search(r"set VLLM_CPU_KVCACHE_SPACE=1 and --max-model-len (\d+)$", str(error.value))
    assert found
    check_cpu(wide, int(found[1]), 1, available)


def test_weights_that_do_not_fit_are_told_so() -> None:
    with pytest.raises(UsageError, match=r"0\.5 GiB available; not even 1 GiB of KV cache fits"):
        check_cpu(CPU, 4096, 1, GIB // 2)


def test_gpus_are_checked_only_where_their_memory_is_known() -> None:
    plan = memory(ENCODED, ranks=2)
    check_gpus(plan, 4096, [], [])
    check_gpus(plan, 4096, [], [1])
    needed = plan.weights.total + 4096 * plan.token_bytes
    check_gpus(plan, 4096, [], [int(needed / 0.92) + 1, 1, needed * 2])
    with pytest.raises(UsageError, match=r"allowed by --gpu-memory-utilization 0\.92 of .*lower --max-model-len"):
        check_gpus(plan, 4096, [], [needed, needed])
    for passed in (["--gpu-memory-utilization", "1"], ["--gpu_memory_utilization=1.0", "--x"]):
        check_gpus(plan, 4096, passed, [needed, needed])
    with pytest.raises(UsageError, match=r"--gpu-memory-utilization 0\.92"):
        check_gpus(plan, 4096, ["--gpu-memory-utilization"], [needed, needed])


def test_memory_of_gpus_is_what_the_drivers_tool_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stands for the tool where there is no GPU: two cards, and one whose memory it does not tell.
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_bytes() == []
    tool = tmp_path / "nvidia-smi"
    for script, totals in (("echo 97887; echo 97887; echo '[N/A]'", [97887 << 20] * 2), ("echo 1; exit 9", [])):
        tool.write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
        tool.chmod(0o755)
        assert gpu_bytes() == totals


def test_serve_refuses_before_it_loads(
    random_checkpoint: Path,
    random_parent: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1000000")
    for argv in ([str(random_checkpoint)], [str(random_parent), "--bf16"]):
        assert main(["serve", *argv, "--port", "8917"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert re.fullmatch(
            r"vqserve: error: too little memory: about 100000[0-9]\.\d GiB needed \(weights 0\.\d GiB, "
            r"KV cache 1 x 1000000 GiB, processes 2\.0 GiB\), \d+\.\d GiB available; (set|not even) .*",
            line,
        )
        assert main(["serve", *argv, "--print"]) == 0, "what is only shown needs no memory"
        capsys.readouterr()
