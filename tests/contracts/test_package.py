"""What is installed without a checkout: the wheel holds every file that the code reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PLUGIN = Path(__file__).parents[2] / "plugin"


def test_the_wheel_holds_all_sources_and_data(tmp_path: Path) -> None:
    copied = shutil.copytree(PLUGIN, tmp_path / "plugin", ignore=shutil.ignore_patterns("demo", "build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(copied)]
    subprocess.run([*command, "--wheel-dir", str(tmp_path)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("vqserve/")}
    sources = {
        str(path.relative_to(PLUGIN / "src"))
        for path in (PLUGIN / "src" / "vqserve").rglob("*")
        if path.is_file() and path.suffix in (".py", ".cu", ".cuh", ".json", ".typed")
    }
    assert sources - held == set()
