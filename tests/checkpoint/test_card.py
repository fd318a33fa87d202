from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vqserve.cli import main
from vqserve.format.card import CARD, scores_section
from vqserve.format.files import check_checkpoint
from vqserve.format.manifest import MANIFEST, write_manifest

SERVED: dict[str, Any] = {
    "task": "arithmetic",
    "seed": 0,
    "scores": [
        {"mode": "thinking", "group": "ja", "items": 300, "right": 0.99, "low": 0.971, "high": 0.997, "ended": 1.0},
        {"mode": "direct", "group": "512 tokens", "items": 15, "right": 1.0, "low": 0.796, "high": 1.0, "ended": 1.0},
        {
            "mode": "direct",
            "group": "512 tokens at 0%",
            "items": 3,
            "right": 1.0,
            "low": 0.4,
            "high": 1.0,
            "ended": 1.0,
        },
        {"mode": "thinking", "group": "word +", "items": 63, "right": 0.5, "low": 0.4, "high": 0.6, "ended": 1.0},
    ],
    "against": {"gained": 1, "lost": 4, "p": 0.375},
}
KL = {"kl": {"all": {"tokens": 11260, "mean": 0.01234, "low": 0.011, "high": 0.014, "top1": 0.991}}}


@pytest.fixture
def checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(random_checkpoint, tmp_path / "checkpoint")
    (folder / CARD).write_text(f"# A model\n\n{scores_section('Not measured yet.')}\n\nThe end.\n", encoding="utf-8")
    write_manifest(folder)
    return folder


def result(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_scores_come_into_the_card_and_the_checkpoint_stays_whole(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [result(tmp_path, "sums.json", SERVED), result(tmp_path, "kl.json", KL)]
    assert main(["card", str(checkpoint), "--scores", *map(str, files)]) == 0
    card = (checkpoint / CARD).read_text(encoding="utf-8")
    assert "Not measured" not in card
    assert "| thinking | ja | 300 | 99.0% | 97.1% - 99.7% |" in card
    assert "| direct | 512 tokens | 15 | 100.0% | 79.6% - 100.0% |" in card
    assert "word +" not in card
    assert "at 0%" not in card
    assert "1 gained, 4 lost" in card
    assert "| all | 11260 | 0.01234 | 0.01100 - 0.01400 | 99.10% |" in card
    assert card.startswith("# A model\n")
    assert card.endswith("\nThe end.\n")
    check_checkpoint(checkpoint, digests=True)
    assert not [path.name for path in checkpoint.iterdir() if path.name.startswith(".")]
    assert "the manifest is right" in capsys.readouterr().out


def test_new_scores_replace_old_ones(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["card", str(checkpoint), "--scores", str(result(tmp_path, "sums.json", SERVED))]) == 0
    assert main(["card", str(checkpoint), "--scores", str(result(tmp_path, "kl.json", KL))]) == 0
    card = (checkpoint / CARD).read_text(encoding="utf-8")
    assert "0.01234" in card
    assert "gained" not in card


def served(**changes: object) -> str:
    return json.dumps(SERVED | {"scores": [SERVED["scores"][0] | changes]})


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{}", "3", "null", "[" * 100_000, '{"kl": []}', '{"kl": {}}', '{"kl": {"all": {"mean": 0.1}}}'),
        json.dumps({"task": "recall", "seed": 0}),
        json.dumps(SERVED | {"task": "<!-- scores: end -->"}),
        json.dumps(SERVED | {"scores": []}),
        json.dumps(SERVED | {"seed": True}),
        json.dumps(SERVED | {"against": {"gained": -1, "lost": 0}}),
        json.dumps(KL).replace("0.01234", "NaN"),
        json.dumps(KL).replace("0.01234", "1e999"),
        json.dumps(KL).replace("0.01234", "9" * 400),
        json.dumps(KL).replace("0.991", "1.1"),
        json.dumps(KL).replace('"all"', '"a | b"'),
        served(mode="a\n|b"),
        served(group="all\n"),
        served(right="NaN"),
        served(right=-0.1),
        served(items=1.5),
        served(high=None),
        served().replace("0.997", "1e999"),
        served().replace("0.99,", "NaN,"),
    ],
)
def test_what_is_no_result_is_refused_and_the_card_stays(
    content: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    path = tmp_path / "result.json"
    path.write_text(content, encoding="utf-8")
    assert main(["card", str(checkpoint), "--scores", str(path)]) == 2
    assert f"{path}: not what `vqserve eval --json` writes" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_a_card_without_a_place_for_scores_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / CARD).write_text("# Another card\n", encoding="utf-8")
    write_manifest(checkpoint)
    assert main(["card", str(checkpoint), "--scores", str(result(tmp_path, "kl.json", KL))]) == 2
    assert "no place for scores" in capsys.readouterr().err


def test_a_card_that_is_no_text_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / CARD).write_bytes(b"\xff")
    write_manifest(checkpoint)
    assert main(["card", str(checkpoint), "--scores", str(result(tmp_path, "kl.json", KL))]) == 2
    assert "README.md: expected the model card, as UTF-8; restore it" in capsys.readouterr().err


def test_a_damaged_checkpoint_gets_no_scores(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = (checkpoint / MANIFEST).read_bytes()
    (checkpoint / "config.json").write_bytes((checkpoint / "config.json").read_bytes() + b"\n")
    assert main(["card", str(checkpoint), "--scores", str(result(tmp_path, "kl.json", KL))]) == 2
    assert "config.json: expected" in capsys.readouterr().err
    assert (checkpoint / MANIFEST).read_bytes() == manifest
