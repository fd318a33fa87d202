"""`vqserve verify`, and what of it `vqserve serve` finds as well."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import torch

from damage import DAMAGES, FIRST, SECOND, Damage, change_bytes, change_json, change_tensors, flip
from vqserve.checkpoint.verify import verify
from vqserve.cli import main
from vqserve.format.files import INDEX
from vqserve.format.manifest import MANIFEST, write_manifest

Capture = pytest.CaptureFixture[str]
NAMED = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.sentence)


@pytest.fixture
def checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `random_checkpoint` to damage."""
    return shutil.copytree(random_checkpoint, tmp_path / "checkpoint")


def refusals(capsys: Capture, *argv: str) -> list[str]:
    """The lines on stderr with which a command ends."""
    assert main(argv) == 2
    out, error = capsys.readouterr()
    assert out == ""
    lines = error.splitlines()
    for line in lines:
        assert line.isprintable()
        assert line.startswith("vqserve: error: ")
    return lines


def padded(folder: Path, size: int) -> Path:
    """The checkpoint with one more file, of `size` zeros that take no room; its digest in the manifest is wrong."""
    with (folder / "zeros.txt").open("wb") as file:
        file.truncate(size)
    change_json(folder, MANIFEST, lambda m: m["files"].update({"zeros.txt": {"size": size, "sha256": "0" * 64}}))
    return folder


def test_a_whole_checkpoint_passes_with_one_line(random_checkpoint: Path, capsys: Capture) -> None:
    assert main(["verify", str(random_checkpoint)]) == 0
    out, error = capsys.readouterr()
    assert re.fullmatch(rf"{random_checkpoint}: 9 files, 8\.\d MB, \d+ tensors; .* are right \(.* s, .* GB/s\)\n", out)
    assert error == ""


@NAMED
def test_verify_refuses_it_with_place_expectation_and_remedy(damage: Damage, checkpoint: Path, capsys: Capture) -> None:
    damage.inflict(checkpoint)
    lines = refusals(capsys, "verify", str(checkpoint))
    assert any(damage.refused_by(line) for line in lines), lines


@NAMED
def test_serve_refuses_it_as_far_as_its_checks_go(damage: Damage, checkpoint: Path, capsys: Capture) -> None:
    damage.inflict(checkpoint)
    if damage.at_serve:
        [line] = refusals(capsys, "serve", str(checkpoint), "--print")
        assert damage.refused_by(line), line
    else:
        assert main(["serve", str(checkpoint), "--print"]) == 0


def test_a_path_that_holds_no_checkpoint_is_refused_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    [line] = refusals(capsys, "verify", str(tmp_path / "nowhere"))
    assert "expected a folder, found nothing" in line
    [line] = refusals(capsys, "verify", str(tmp_path))
    assert "not a checkpoint: it holds no config.json" in line


def test_an_unquantized_checkpoint_is_told_to_be_encoded_first(random_parent: Path, capsys: Capture) -> None:
    assert any("vqserve encode" in line for line in refusals(capsys, "verify", str(random_parent)))


def test_known_answers_are_checked_too(checkpoint: Path, capsys: Capture) -> None:
    (checkpoint / "known_answers.json").write_text('{"version": 1, "prompts": []}', encoding="utf-8")
    write_manifest(checkpoint)
    [line] = refusals(capsys, "verify", str(checkpoint))
    assert "known_answers.json: prompts: expected a list with at least one prompt" in line


def test_every_damaged_file_is_listed(checkpoint: Path, capsys: Capture) -> None:
    names = sorted(path.name for path in checkpoint.iterdir() if path.name not in (MANIFEST, "config.json"))
    for name in names:
        change_bytes(checkpoint, name, flip(-1))
    lines = refusals(capsys, "verify", str(checkpoint))
    for name in names:
        assert any(f"{checkpoint / name}: expected" in line for line in lines), name


def test_every_kind_of_finding_is_listed_at_once(checkpoint: Path, capsys: Capture) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][3, 4] = torch.nan
        tensors["model.norm.weight"][7] = torch.inf
        tensors["model.layers.2.mlp.experts.routed_experts.codebook_a"][0, 0] += 1

    change_tensors(checkpoint, poison)
    change_bytes(checkpoint, "tokenizer.json", lambda content: content[:-1])
    change_bytes(checkpoint, "README.md", flip(0))
    (checkpoint / "surplus.txt").touch()
    lines = refusals(capsys, "verify", str(checkpoint))
    problems = (
        r"README\.md: expected sha256",
        r"lm_head\.weight: expected finite values, found NaN or infinity at \[3, 4\]",
        r"norm\.weight: expected finite values, found NaN or infinity at \[7\]",
        r"codebook_a: expected the same codebook",
        r"surplus\.txt: surplus",
        r"tokenizer\.json: expected \d+ bytes",
    )
    assert len(lines) == len(problems)
    for problem in problems:
        assert any(re.search(problem, line) for line in lines), problem


def test_a_damaged_configuration_hides_no_damaged_weights(checkpoint: Path, capsys: Capture) -> None:
    change_bytes(checkpoint, "config.json", lambda content: content[:-2])
    change_bytes(checkpoint, FIRST, flip(-1))
    (checkpoint / SECOND).unlink()
    lines = refusals(capsys, "verify", str(checkpoint))
    assert len(lines) == 3
    assert all(any(name in line for line in lines) for name in ("config.json", FIRST, SECOND))


def test_a_value_is_found_wherever_pieces_end(
    checkpoint: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    generator = torch.Generator().manual_seed(seed)
    row, column = (int(torch.randint(size, (), generator=generator)) for size in (640, 256))

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][row, column] = -torch.inf

    change_tensors(checkpoint, poison)
    monkeypatch.setattr("vqserve.checkpoint.verify._PIECE", 4096)
    [line] = refusals(capsys, "verify", str(checkpoint))
    assert f"lm_head.weight: expected finite values, found NaN or infinity at [{row}, {column}]" in line


def test_a_file_that_cannot_be_read_is_one_finding_among_others(checkpoint: Path, capsys: Capture) -> None:
    change_bytes(checkpoint, FIRST, flip(-1))
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.json").mkdir()
    lines = refusals(capsys, "verify", str(checkpoint))
    assert [FIRST in lines[0], "tokenizer.json" in lines[1]] == [True, True]


def test_the_terminal_gets_fifty_lines_and_the_file_all(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    change_tensors(checkpoint, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".2.mlp." in name])
    result = tmp_path / "result.json"
    lines = refusals(capsys, "verify", str(checkpoint), "--json", str(result))
    findings = json.loads(result.read_text(encoding="utf-8"))["findings"]
    assert len(findings) > 100
    assert lines[50:] == [f"vqserve: error: and {len(findings) - 50} more; --json FILE lists all"]
    for line, finding in zip(lines[:50], findings, strict=False):
        assert line == f"vqserve: error: {finding['where']}: {finding['problem']}; {finding['remedy']}"


def test_the_result_of_a_whole_checkpoint_is_written_too(random_checkpoint: Path, tmp_path: Path) -> None:
    assert main(["verify", str(random_checkpoint), "--quiet", "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in random_checkpoint.iterdir() if path.name != MANIFEST)
    assert (result["path"], result["files"], result["bytes"]) == (str(random_checkpoint), 9, size)
    assert result["findings"] == []


def test_a_result_inside_the_checkpoint_is_refused(checkpoint: Path, capsys: Capture) -> None:
    [line] = refusals(capsys, "verify", str(checkpoint), "--json", str(checkpoint / "result.json"))
    assert "would be a surplus file of the checkpoint" in line
    assert not (checkpoint / "result.json").exists()


def test_a_result_for_nowhere_is_refused_before_the_reading(checkpoint: Path, capsys: Capture) -> None:
    (checkpoint / FIRST).unlink()
    [line] = refusals(capsys, "verify", str(checkpoint), "--json", "nowhere/result.json")
    assert "--json nowhere/result.json: there is no folder nowhere; make it, or name" in line


def test_names_that_are_no_unicode_are_written_as_json_s_escapes(
    checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    change_json(checkpoint, INDEX, lambda index: index["weight_map"].update({"x\ud800": FIRST}))
    refusals(capsys, "verify", str(checkpoint), "--json", str(tmp_path / "result.json"))
    [finding] = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["findings"]
    assert finding["where"].endswith("x\ud800")


def test_memory_does_not_grow_with_the_files(checkpoint: Path) -> None:
    tracemalloc.start()
    try:
        verdict = verify(padded(checkpoint, 1 << 28), threads=2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert verdict.nbytes > 1 << 28
    assert [problem.where for problem in verdict.findings] == [str(checkpoint / "zeros.txt")]
    assert peak < 1 << 24


class OnTerminal:
    """`vqserve verify` in a process of its own, stderr being a terminal."""

    def __init__(self, *argv: str) -> None:
        self._end, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (24, 80))  # in a terminal without a size no bar has room
        command = [sys.executable, "-c", "import sys; from vqserve.cli import main; sys.exit(main())", "verify", *argv]
        # Whatever runs the tests may ignore SIGINT, as shells have their background jobs do; a terminal's job does not.
        heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=terminal, preexec_fn=heard)
        os.close(terminal)
        self.shown = ""

    def read_until(self, pattern: str) -> bool:
        """Whether the terminal showed it before the process ended."""
        while not re.search(pattern, self.shown):
            try:
                self.shown += os.read(self._end, 4096).decode()
            except OSError:  # what Linux says when the other side of a terminal has been closed
                return False
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


def test_a_terminal_shows_the_progress_unless_told_to_be_quiet(random_checkpoint: Path) -> None:
    for options, wanted in (((), True), (("--quiet",), False)):
        terminal = OnTerminal(str(random_checkpoint), *options)
        try:
            assert terminal.read_until(r"\d+%\|.*B/s\]") == wanted
            terminal.read_until("never shown")
            assert terminal.process.wait(60) == 0
        finally:
            terminal.close()


def test_an_interrupt_ends_it_at_once(checkpoint: Path) -> None:
    terminal = OnTerminal(str(padded(checkpoint, 1 << 40)))  # minutes of reading
    try:
        assert terminal.read_until(r"\d+%\|.*[1-9][0-9.]*GB?/s\]|\d+%\|.*[1-9][0-9.]*MB?/s\]")
        terminal.process.send_signal(signal.SIGINT)
        terminal.read_until("never shown")  # to its end: a full terminal would hold it up
        assert terminal.process.wait(20) == 130
        assert "Traceback" not in terminal.shown
    finally:
        terminal.close()
