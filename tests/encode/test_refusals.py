"""What an encode cannot take is refused in one line, and nothing is left of it."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from encode.whole import arguments, digests, refused
from random_checkpoint import read_tensors
from random_parent import write_weights
from vqserve import cli
from vqserve.encode import pipeline
from vqserve.encode.pipeline import encode
from vqserve.encode.work import open_work, save_tensors
from vqserve.encode.writer import claimed
from vqserve.format.errors import UsageError
from vqserve.model import weights

pytestmark = pytest.mark.usefixtures("few_vectors")


def with_weights(parent: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of the parent with other weights."""
    shutil.copytree(parent, folder)
    tensors = read_tensors(folder)
    change(tensors)
    write_weights(folder, tensors, 2)
    return folder


def test_a_wrong_source_is_refused(
    parent: Path, calibration: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "nowhere" in refused(capsys, *arguments(tmp_path / "nowhere", out, calibration))
    assert "config.json" in refused(capsys, *arguments(tmp_path, out, calibration))
    assert "quantized already" in refused(capsys, *arguments(encoded, out, calibration))
    assert not out.exists()


def test_a_damaged_source_is_refused_and_the_file_named(
    parent: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(parent, damaged)
    cut = sorted(damaged.glob("*.safetensors"))[1]
    os.truncate(cut, cut.stat().st_size - 100)
    assert cut.name in refused(capsys, *arguments(damaged, tmp_path / "out", calibration))
    cut.unlink()
    assert cut.name in refused(capsys, *arguments(damaged, tmp_path / "out", calibration))


def test_a_source_that_lacks_a_tensor_is_refused_and_the_tensor_named(
    calibration: Path, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short"
    shutil.copytree(parent, short)
    config = json.loads((short / "config.json").read_text())
    config["n_routed_experts"] += 1
    (short / "config.json").write_text(json.dumps(config))
    line = refused(capsys, *arguments(short, tmp_path / "out", calibration))
    assert "mlp.gate.weight" in line or "mlp.experts.6" in line


@pytest.mark.parametrize(
    "name",
    [
        *(f"model.layers.1.self_attn.indexer.{leaf}" for leaf in ("wk.weight", "weights_proj.weight", "k_norm.bias")),
        *("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"),
    ],
)
def test_weights_that_no_layer_computes_with_are_checked_before_the_first_step(
    name: str, parent: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = with_weights(parent, tmp_path / "bad", lambda tensors: tensors[name].view(-1)[-1].fill_(float("nan")))
    line = refused(capsys, *arguments(bad, tmp_path / "out", calibration))
    assert f"{name}: expected finite values, found nan at [" in line
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused_and_the_tensor_named(
    parent: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.2.mlp.experts.1.down_proj.weight"
    bad = with_weights(parent, tmp_path / "bad", lambda tensors: tensors[name][3].fill_(float("nan")))
    line = refused(capsys, *arguments(bad, tmp_path / "out", calibration))
    assert f"{name}: expected finite values, found nan at [3, 0]" in line


def test_a_weight_that_no_model_has_is_refused_and_the_tensor_named(
    parent: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    bad = with_weights(parent, tmp_path / "bad", lambda tensors: tensors[name][0, 1].fill_(-1e30))
    line = refused(capsys, *arguments(bad, tmp_path / "out", calibration))
    assert re.search(rf"{name}: expected values of at most 65504, found -1\S*e\+30 at \[0, 1\]", line)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map: names Python code"),
        ("config.json", {"eos_token_id": 100000}, "eos_token_id: expected token ids from 0 to"),
        ("generation_config.json", {"temperature": "hot"}, "temperature: expected a number"),
        ("generation_config.json", "{", "expected JSON"),
        ("chat_template.jinja", "{% if x %}", "expected a Jinja template"),
        ("known_answers.json", {"version": 1, "prompts": []}, "expected a list with at least one prompt"),
    ],
)
def test_what_the_result_takes_over_is_refused_if_its_server_would_refuse_it(
    name: str,
    content: str | dict[str, object],
    said: str,
    parent: Path,
    calibration: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(parent, odd)
    before = json.loads((odd / name).read_text()) if name == "config.json" else {}
    (odd / name).write_text(content if isinstance(content, str) else json.dumps(before | content))
    line = refused(capsys, *arguments(odd, tmp_path / "out", calibration))
    assert f"{odd / name}" in line
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--base-model", "\udcff"], ["--license", "mit\nbase_model: other"]])
def test_names_that_a_model_card_cannot_hold_are_refused(
    options: list[str], parent: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *arguments(parent, tmp_path / "out", calibration, *options))
    assert f"{options[0]} {options[1]!r}: would be in the model card" in line


def test_weights_too_large_to_compute_with_are_refused_and_the_layer_named(
    parent: Path,
    calibration: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "model.layers.1.self_attn.q_a_layernorm.weight"
    monkeypatch.setattr(weights, "LARGEST", math.inf)
    large = with_weights(parent, tmp_path / "large", lambda tensors: tensors[name].fill_(1e38))
    line = refused(capsys, *arguments(large, tmp_path / "out", calibration))
    assert "model.layers.1: the outputs of this layer are not finite" in line


def test_a_second_encode_into_the_same_folder_is_refused_while_the_first_runs(
    parent: Path, calibration: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with claimed(out):
        line = refused(capsys, *arguments(parent, out, calibration, "--work", str(work)))
    assert f"{out}: another encode is at work in this folder (process {os.getpid()} on " in line
    with open_work(work, json.loads((work / "key.json").read_text())):
        line = refused(capsys, *arguments(parent, tmp_path / "new" / "other", calibration, "--work", str(work)))
    assert not (tmp_path / "new").exists()
    assert f"{work}: another encode is at work in this folder (process {os.getpid()} on " in line


def test_a_work_folder_that_cannot_be_made_is_refused_and_nothing_is_left(
    parent: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "out").mkdir()
    for place, problem in (
        (tmp_path / "file" / "x", "cannot be made (Not a directory)"),
        (tmp_path / "link", "is a link to nothing"),
    ):
        for out in (tmp_path / "out", tmp_path / "new" / "out"):
            line = refused(capsys, *arguments(parent, out, calibration, "--work", str(place)))
            assert line == f"vqserve: error: {place}: {problem}; choose another place for the folder"
    assert refused(capsys, *arguments(parent, tmp_path / "link", calibration)).endswith(
        f"{tmp_path / 'link'}: is a link to nothing; choose another place for the folder"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "out"]
    assert not list((tmp_path / "out").iterdir())


def test_an_encode_that_fails_at_its_first_step_leaves_no_folder_for_its_result(
    parent: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_run_steps", stop)
    for out in (tmp_path / "new" / "out", tmp_path / "old"):
        (tmp_path / "old").mkdir(exist_ok=True)
        with pytest.raises(KeyboardInterrupt):
            encode(parent, out, bits=2.0, calibration=calibration, progress=False, work=tmp_path / "work")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "work"]
    assert not list((tmp_path / "old").iterdir())


@pytest.mark.parametrize("write", ["pathlib.Path.write_bytes", "pathlib.Path.write_text", "os.write"])
def test_a_disk_that_is_full_for_small_files_too_is_said_in_one_line(
    write: str,
    parent: Path,
    calibration: Path,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(write, full)
        line = refused(capsys, *arguments(parent, out, calibration, "--work", str(work)))
    assert re.fullmatch(
        rf"vqserve: error: {out}/\S+: cannot be written \(No space left on device\), [\d,]+ bytes free; make room .*",
        line,
    )
    assert out.exists() == (write != "os.write"), "nothing is left of an encode that did not begin"
    assert cli.main(arguments(parent, out, calibration, "--work", str(work))) == 0


def test_a_destination_with_something_in_it_is_refused_and_left_alone(
    parent: Path, calibration: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(encoded)
    assert "not empty" in refused(capsys, *arguments(parent, encoded, calibration))
    assert "not empty" in refused(capsys, *arguments(parent, parent, calibration))
    assert digests(encoded) == before
    (tmp_path / "file").touch()
    assert "is a file" in refused(capsys, *arguments(parent, tmp_path / "file", calibration))


def test_a_work_folder_of_another_encode_is_refused(
    parent: Path, calibration: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = arguments(parent, tmp_path / "out", calibration, "--work", str(work), "--seed", "1")
    assert "another encode (seed, tokens differ)" in refused(capsys, *other)
    assert not (tmp_path / "out").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").touch()
    foreign = arguments(parent, tmp_path / "out", calibration, "--work", str(tmp_path / "home"))
    assert "not a work folder" in refused(capsys, *foreign)
    for folder in (tmp_path / "out", tmp_path / "out" / "work", tmp_path):
        nested = arguments(parent, tmp_path / "out", calibration, "--work", str(folder))
        assert "choose a folder apart from the result" in refused(capsys, *nested)
    assert not (tmp_path / "out").exists()


def test_a_bad_calibration_file_or_budget_is_refused_before_anything_is_written(
    parent: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bad = tmp_path / "out", tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"texts": "typo"}\n')
    assert f"{bad}, line 2: expected" in refused(capsys, *arguments(parent, out, bad))
    assert "1.125 to 3.125" in refused(capsys, *arguments(parent, out, calibration, "--bits", "0.5"))
    assert not out.exists()


@pytest.mark.parametrize(
    "option",
    [["--file-size", "huge"], ["--file-size", "0"], ["--workers", "0"], ["--bits", "x"], ["--seed", str(10**30)]],
)
def test_a_senseless_option_is_refused(
    option: list[str], parent: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments(parent, tmp_path / "out", calibration, *option))
    assert caught.value.code == 2
    assert option[0] in capsys.readouterr().err


def test_room_for_the_whole_is_looked_for_before_the_first_step(
    parent: Path,
    calibration: Path,
    work: Path,
    encoded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result, steps_done = (sum(path.stat().st_size for path in at.glob("*.safetensors")) for at in (encoded, work))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=result // 2))
    out = tmp_path / "out"
    for more in ([], ["--work", str(tmp_path / "new")]):
        line = refused(capsys, *arguments(parent, out, calibration, *more))
        found = re.fullmatch(
            rf"vqserve: error: {out}: an encode takes at least ([\d,]+) bytes more, {result // 2:,} bytes free; .*",
            line,
        )
        assert found is not None, line
        assert 2 * result < int(found[1].replace(",", "")) < result + steps_done
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=result))
    again = arguments(parent, out, calibration, "--work", str(work))
    assert cli.main(again) == 0, "the work is there, and the result fits"


def test_room_is_looked_for_before_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=399))
    with pytest.raises(UsageError, match=r"x\.safetensors: 400 bytes needed, 399 bytes free; make room"):
        save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(100)})
    assert not list(tmp_path.iterdir())
