from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "plugin" / "src"
IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
    print(module.name)
"""


def import_all(package: str) -> subprocess.CompletedProcess[str]:
    """Import every module of a package in a Python that sees the standard library and our sources, nothing else."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", "-c", IMPORT_ALL, package]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_format_package_imports_with_the_standard_library_alone() -> None:
    done = import_all("vqserve.format")
    assert done.returncode == 0, done.stderr
    assert "vqserve.format.config" in done.stdout.split()


def test_a_package_that_needs_torch_does_not_import_there() -> None:
    done = import_all("vqserve.reference")
    assert done.returncode != 0
    assert "No module named 'torch'" in done.stderr
