"""`make demo` on a checkout whose model is missing or damaged; that it serves is for e2e to show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def refused(folder: Path) -> str:
    """What `make demo` prints before make's own line."""
    command = ["make", "-o", ".venv/.runtime", "demo", f"BIN={Path(sys.executable).parent}", f"DEMO={folder}"]
    # What a `make test` around this one hands down would make it say which folder it enters.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    line, makes = done.stderr.splitlines()
    assert makes.startswith("make: ***")
    return line


@pytest.mark.parametrize("file", ["config.json", "manifest.json", "model-00001-of-00001.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_named_with_the_command_that_gets_it_back(
    file: str, demo_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(demo_model, tmp_path / "model")
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    line = refused(folder)
    assert line.startswith(f"vqserve: error: {folder / file}: ")
    assert line.endswith(f": git checkout -- {folder}")
    (folder / file).unlink()
    line = refused(folder)
    assert file in line
    assert line.endswith(f": git checkout -- {folder}")


def test_a_missing_folder_is_named_too(tmp_path: Path) -> None:
    line = refused(tmp_path / "model")
    assert line.startswith(f"vqserve: error: {tmp_path / 'model'}: expected a folder, found nothing")
    assert line.endswith(f": git checkout -- {tmp_path / 'model'}")
