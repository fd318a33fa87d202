"""`vqserve bench kernels`: what it says without a GPU, what it makes of measurements, and on a GPU the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vqserve.bench.picture import draw
from vqserve.cli import main

ROW: dict[str, Any] = {
    "tiers": "mix",
    "ranks": 1,
    "tokens": 1,
    "kernel": "tables",
    "us": 50.0,
    "gate_up_us": 30.0,
    "down_us": 15.0,
    "flops": 6 * 8 * 6144 * 2048,
    "nbytes": 80_000_000,
    "copy_share": 0.7,
    "shared_share": 0.2,
    "error": 1e-3,
    "eager_us": 5000.0,
    "bf16_us": None,
    "marlin_us": None,
    "aqlm_us": None,
}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels"]) == 2
    assert capsys.readouterr().err == "vqserve: error: no CUDA GPU found; run this on a machine with one\n"


def test_an_unknown_tier_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "kernels", "--tiers", "a,e"])
    assert ended.value.code == 2
    assert "'e': expected some of mix,a,b,c,d" in capsys.readouterr().err


def test_the_picture_has_a_panel_per_sharing(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "tokens": 8, "us": 300.0, "flops": 8 * ROW["flops"]}, {**ROW, "ranks": 2}]
    found = {"machine": {"gpu": "a card"}, "copy bytes per second": 2.4e12, "rows": rows}
    draw(tmp_path / "roofline.svg", found)
    drawn = (tmp_path / "roofline.svg").read_text(encoding="utf-8")
    assert "<!-- whole experts -->" in drawn
    assert "<!-- one rank of 2 -->" in drawn


@pytest.mark.gpu
def test_on_a_gpu_every_figure_comes_with_its_error(tmp_path: Path) -> None:
    options = ["--tiers", "mix,b", "--ranks", "2", "--tokens", "1,9", "--json", str(tmp_path / "found.json")]
    assert main(["bench", "kernels", *options]) in (0, 1)
    rows = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["tiers"], row["tokens"], row["kernel"]) for row in rows] == [
        ("mix", 1, "tables"),
        ("mix", 9, "gather"),
        ("b", 1, "tables"),
        ("b", 9, "gather"),
    ]
    assert all(0 < row["error"] < 2e-3 and row["us"] > 0 for row in rows)
