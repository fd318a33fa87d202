"""`make demo` on a checkout whose model is missing or damaged; that it serves is for e2e to show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def remedy(folder: Path) -> str:
    return f": git checkout -- {folder} && git clean -fdx {folder}"


def make(folder: Path, programs: Path) -> subprocess.CompletedProcess[str]:
    """`make demo` with the model in a folder."""
    command = ["make", "-o", ".venv/.runtime", "demo", f"BIN={programs}", f"DEMO={folder}"]
    # What a `make test` around this one hands down would make it say which folder it enters.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    return subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)


def refused(folder: Path) -> str:
    """What `make demo` prints before make's own line."""
    done = make(folder, Path(sys.executable).parent)
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
    assert line.endswith(remedy(folder))
    (folder / file).unlink()
    line = refused(folder)
    assert file in line
    assert line.endswith(remedy(folder))


def test_a_missing_folder_is_named_too(tmp_path: Path) -> None:
    line = refused(tmp_path / "model")
    assert line.startswith(f"vqserve: error: {tmp_path / 'model'}: expected a folder, found nothing")
    assert line.endswith(remedy(tmp_path / "model"))


def test_what_is_too_much_is_named_and_the_command_gets_rid_of_it(demo_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(demo_model, tmp_path / "model")
    for command in (("init", "-q"), ("add", "model")):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    (folder / "notes.txt").touch()
    (folder / "sub").mkdir()
    (folder / "sub" / "x.bin").touch()
    (folder / "config.json").unlink()
    line = refused(folder)
    assert line.startswith(f"vqserve: error: {folder}")
    subprocess.run(line.rpartition(": ")[2], shell=True, cwd=tmp_path, capture_output=True, check=True)
    assert {path.name for path in folder.iterdir()} == {path.name for path in demo_model.iterdir()}


def test_a_folder_with_a_space_in_its_name_is_one_word(tmp_path: Path) -> None:
    line = refused(tmp_path / "the model")
    assert line.startswith(f"vqserve: error: {tmp_path / 'the model'}: expected a folder, found nothing")
    assert line.endswith(remedy(tmp_path / "the model").replace("the model", "the\\ model"))


def test_a_verify_that_warns_is_no_refusal_and_one_that_dies_is(tmp_path: Path) -> None:
    script = tmp_path / "vqserve"
    script.write_text('#!/bin/sh\necho a warning >&2\n[ "$1" = serve ] && { echo serving >&2; exit 3; }\nexit 0\n')
    script.chmod(0o755)
    assert make(tmp_path / "model", tmp_path).stderr.splitlines()[:2] == ["a warning", "serving"]
    script.write_text("#!/bin/sh\necho Traceback >&2\necho MemoryError >&2\nexit 1\n")
    assert make(tmp_path / "model", tmp_path).stderr.splitlines()[0] == f"MemoryError{remedy(tmp_path / 'model')}"
