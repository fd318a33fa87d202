"""An encode that is killed, or finds its disk full or its work damaged or not its own, goes on or says why not."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from safetensors.torch import load_file

import vqserve
from encode.mortal import encode_until
from encode.whole import FILE_SIZE, arguments, digests, refused
from vqserve import cli
from vqserve.encode import code
from vqserve.encode.work import Work
from vqserve.encode.writer import MARKER

pytestmark = pytest.mark.usefixtures("few_vectors")


def read_all(folder: Path) -> None:
    """Under a final name a file is whole."""
    for path in (*folder.glob("[!.]*.safetensors"), *(folder / "work").glob("[!.]*.safetensors")):
        load_file(path)


@pytest.mark.slow
def test_an_encode_killed_again_and_again_ends_with_the_same_bytes(
    parent: Path, calibration: Path, encoded: Path, tmp_path: Path, seed: int
) -> None:
    destination, random = tmp_path / "result", Random(seed)
    # One worker, where `encoded` was made with one per core: that must not matter either.
    command = arguments(parent, destination, calibration, "--file-size", str(FILE_SIZE), "--workers", "1")
    for kill_at in (random.randint(1, 12), *random.choices(range(1, 50), k=3)):
        assert encode_until(command, destination, kill_at) == (-9, kill_at)
        read_all(destination)
    assert encode_until(command, destination)[0] == 0
    assert digests(destination) == digests(encoded)
    assert sorted(path.name for path in destination.iterdir() if path.is_dir()) == []


@pytest.mark.slow
def test_an_encode_killed_while_it_writes_or_clears_away_ends_with_the_same_bytes(
    parent: Path, calibration: Path, work: Path, encoded: Path, tmp_path: Path, seed: int
) -> None:
    random, last = Random(seed), 0
    for part in (None, (0.0, 0.3), (0.3, 0.6), (0.6, 1.0)):
        destination = tmp_path / f"{part}"
        shutil.copytree(work, destination / "work")
        (destination / MARKER).touch()
        command = arguments(parent, destination, calibration, "--file-size", str(FILE_SIZE))
        if part is not None:
            kill_at = 1 + int(random.uniform(*part) * last)
            assert encode_until(command, destination, kill_at) == (-9, kill_at)
            read_all(destination)
            if not (destination / MARKER).exists():
                assert digests(destination) == digests(encoded), "complete: only its work is still there"
                continue
        code, changes = encode_until(command, destination)
        assert code == 0
        last = last or changes
        assert digests(destination) == digests(encoded)
        assert sorted(path.name for path in destination.iterdir() if path.is_dir()) == []


@pytest.mark.slow
def test_a_checkpoint_is_complete_before_what_it_was_made_of_is_cleared_away(
    parent: Path,
    calibration: Path,
    work: Path,
    encoded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(self: Work) -> None:
        raise KeyboardInterrupt

    destination = tmp_path / "result"
    shutil.copytree(work, destination / "work")
    (destination / MARKER).touch()
    command = arguments(parent, destination, calibration, "--file-size", str(FILE_SIZE))
    monkeypatch.setattr(Work, "clear", interrupted)
    assert cli.main(command) == 130
    assert (destination / "work").is_dir()
    assert digests(destination) == digests(encoded)
    assert "not empty, and holds a checkpoint; give a new" in refused(capsys, *command)


@pytest.mark.slow
def test_damaged_work_is_named_and_done_again(
    parent: Path, calibration: Path, encoded: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = [f"{name}.safetensors" for name in ("experts-2-4", "gradient-1", "routing-1", "spine-0")]
    shutil.copytree(work, tmp_path / "work")
    for name in damaged:
        os.truncate(tmp_path / "work" / name, 1000)
    destination = tmp_path / "result"
    options = ["--file-size", str(FILE_SIZE), "--work", str(tmp_path / "work")]
    assert cli.main(arguments(parent, destination, calibration, *options)) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [f"vqserve: {tmp_path / 'work' / name}: damaged; its step runs again" for name in damaged]
    assert digests(destination) == digests(encoded)


def refused_as_work_of_another_encode(
    parent: Path, calibration: Path, work: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """What differs."""
    line = refused(capsys, *arguments(parent, out, calibration, "--work", str(work)))
    found = re.search(r"holds work of another encode \((.*) differ\)", line)
    assert found is not None, line
    return found[1]


@pytest.mark.parametrize(
    "file",
    ["encode/vq.py", "format/tiers.py", "model/forward.py", "model/new/routing.py", "reference/pack.py", "new.py"],
)
def test_work_of_other_code_is_not_taken_over(
    file: str,
    parent: Path,
    calibration: Path,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "vqserve"
    shutil.copytree(Path(vqserve.__file__).parent, source, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(vqserve, "__file__", str(source / "__init__.py"))
    (source / "serve.py").write_text("CHANGED = True\n", encoding="utf-8")
    same = arguments(parent, tmp_path / "same", calibration, "--work", str(work))
    assert cli.main(same) == 0, "the same code, as far as an encode runs it"
    capsys.readouterr()
    (source / file).parent.mkdir(exist_ok=True)
    with (source / file).open("a", encoding="utf-8") as opened:
        opened.write("CHANGED = True\n")
    assert refused_as_work_of_another_encode(parent, calibration, work, tmp_path / "other", capsys) == "code"


@pytest.mark.parametrize("library", ["numpy", "safetensors", "tokenizers", "torch", "transformers"])
def test_work_of_other_libraries_is_not_taken_over(
    library: str,
    parent: Path,
    calibration: Path,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installed = importlib.metadata.version
    monkeypatch.setattr(
        "vqserve.encode.code.version", lambda name: f"{installed(name)}{'.post1' if name == library else ''}"
    )
    assert refused_as_work_of_another_encode(parent, calibration, work, tmp_path / "out", capsys) == "libraries"


def test_an_encode_imports_nothing_that_is_left_out_of_what_its_work_depends_on() -> None:
    command = (
        "import sys, vqserve.encode.command; print(*(name for name in sys.modules if name.startswith('vqserve.')))"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    imported = {name.split(".")[1] for name in done.stdout.split()}
    assert {"encode", "format", "model", "reference"} <= imported
    assert not imported & {Path(name).stem for name in code.ELSEWHERE}


@pytest.mark.slow
def test_a_full_disk_is_said_in_one_line_and_the_encode_goes_on_when_there_is_room(
    parent: Path, calibration: Path, encoded: Path, tmp_path: Path
) -> None:
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, -1)); "
        "from vqserve.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = arguments(parent, tmp_path / "out", calibration, "--file-size", str(FILE_SIZE))
    done = subprocess.run([sys.executable, "-c", limited, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith(f"vqserve: error: {tmp_path / 'out'}")
    assert "cannot be written (" in line
    assert line.endswith("bytes free; make room and run the command again: an encode goes on where it stopped")
    assert "Traceback" not in done.stderr
    assert cli.main(command) == 0
    assert digests(tmp_path / "out") == digests(encoded)
