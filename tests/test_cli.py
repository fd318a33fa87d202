"""The console script: one line and exit code 2 for bad input, never a traceback."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from vqserve import __version__
from vqserve.cli import COMMANDS, main
from vqserve.format.errors import CheckpointError, UsageError


def test_every_subcommand_is_listed_without_importing_any() -> None:
    code = "import sys; from vqserve.cli import main; main(['--help'])"
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, imported = done.stdout.splitlines()
    assert all(any(line.split()[:1] == [name] for line in text) for name in COMMANDS)
    assert imported == "False"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: vqserve {command}" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"vqserve {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["serve"], ["serve", "x", "--port", "many"]])
def test_arguments_that_cannot_be_parsed_end_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2


def test_a_wrong_path_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith(f"vqserve: error: {tmp_path}/nowhere: expected a folder, found nothing;")


def test_what_is_printed_goes_nowhere_if_standard_output_is_closed(random_checkpoint: Path) -> None:
    code = f"from vqserve.cli import main; raise SystemExit(main(['inspect', {str(random_checkpoint)!r}]))"
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_while_a_subcommand_is_imported_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vqserve.cli.import_module", interrupted)
    assert main(["encode", "--help"]) == 130


@pytest.mark.parametrize("odd", ["x\ny", "\x1b[31m", "\ud800", "\u2028"])
def test_whatever_is_quoted_a_refusal_is_one_line(odd: str) -> None:
    for error in (UsageError(f"role {odd}: Größe"), CheckpointError(f"{odd}: Größe", odd, "fetch it")):
        assert str(error).isprintable()
        assert ": Größe" in str(error)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_only_serve_passes_arguments_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["encode", str(tmp_path), str(tmp_path / "to"), "--bits", "2", "--calibration", "c.jsonl", "--", "--x"]
    assert main(argv) == 2
    assert "takes no arguments after `--`" in capsys.readouterr().err


def test_the_installed_script_ends_with_2_and_one_line(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("vqserve")
    done = subprocess.run([script, "serve", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"vqserve: error: {tmp_path}: not a checkpoint: it holds no config.json; "
        "give the folder that holds config.json and the safetensors files\n"
    )
