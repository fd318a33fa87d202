from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import vqserve
from random_parent import CONFIG
from vqserve.checkpoint.assume import assumed, mix_for, read_mix
from vqserve.checkpoint.plan import expert_bits
from vqserve.cli import main

GEOMETRY = Path(vqserve.__file__).parent / "data" / "glm-5.2.json"
Capture = pytest.CaptureFixture[str]


def plan(capsys: Capture, *argv: str) -> tuple[int, str]:
    """Exit code and what was printed, nothing being wrong."""
    code = main(["plan", *argv])
    out, error = capsys.readouterr()
    assert error == ""
    return code, out


def refused(capsys: Capture, *argv: str) -> str:
    """The one line on stderr with which it ends."""
    try:
        code: object = main(["plan", *argv])
    except SystemExit as end:  # argparse's own, below its usage
        code = end.code
    assert code == 2
    out, error = capsys.readouterr()
    assert out == ""
    *_, line = error.splitlines()
    return line


def test_the_real_geometry_plans_without_weights(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "plan.json"
    code, out = plan(capsys, str(GEOMETRY), "--gpus", "2", "--memory", "95GiB", "--json", str(file))
    assert code == 0
    assert "is not quantized; assumed: 27% at 1 bit, 59% at 2 bit, 14% at 3 bit, 4-bit spine" in out
    assert "sparse: fits, up to 29,385 tokens; 4,096 need --gpu-memory-utilization 0.99 or more" in out
    written = json.loads(file.read_text(encoding="utf-8"))
    assert (written["gpus"], written["sparse"]["fits"], written["dense"]["fits"]) == (2, True, False)
    for attention in ("dense", "sparse"):
        part = written[attention]
        weights = part["weights"]
        assert weights["total"] == sum(weights["split"].values()) + sum(weights["whole"].values())
        assert (
            part["needed"] == weights["total"] + part["reserve"] + part["buffers"] + 4096 * part["kv_bytes_per_token"]
        )
        assert part["available"] == 95 << 30


def test_what_does_not_fit_ends_with_1_and_what_would(capsys: Capture) -> None:
    code, out = plan(capsys, str(GEOMETRY), "--memory", "95GiB")
    assert code == 1
    assert "dense: 4,096 tokens do not fit: " in out
    assert re.search(r"sparse: 4,096 .*\n +would fit: 2 GPUs of this size \(\S+ GiB on each\)", out)
    assert re.search(r"would fit: 18\d\.\d+ GiB on each GPU", out)


def test_each_way_out_is_one(capsys: Capture, tmp_path: Path) -> None:
    tight = (str(GEOMETRY), "--gpus", "2", "--memory", "93GiB", "--json", str(tmp_path / "plan.json"))
    code, out = plan(capsys, *tight)
    assert code == 1
    _, out = out.split("sparse: 4,096 tokens do not fit")
    bits = re.search(r"at most (\S+) bits per expert weight \(vqserve encode --bits \1\)", out)
    gpus = re.search(r"would fit: (\d+) GPUs", out)
    assert bits
    assert gpus
    assert plan(capsys, *tight, "--bits", bits[1])[0] == 0
    assert plan(capsys, *tight, "--bits", f"{float(bits[1]) + 0.02:.2f}")[0] == 1
    assert plan(capsys, str(GEOMETRY), "--gpus", gpus[1], "--memory", "93GiB")[0] == 0


def test_a_shorter_context_is_a_way_out(capsys: Capture) -> None:
    argv = (str(GEOMETRY), "--gpus", "2", "--memory", "95GiB", "--context")
    code, out = plan(capsys, *argv, "40000")
    assert code == 1
    assert "would fit: a context of 29,385 tokens" in out
    assert plan(capsys, *argv, "29385")[0] == 0
    assert plan(capsys, *argv, "29386")[0] == 1


def test_experts_that_cannot_be_split_are_shared_out_if_asked(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**CONFIG, "moe_intermediate_size": 128, "n_shared_experts": 2}), encoding="utf-8")
    two = (str(file), "--gpus", "2", "--memory", "1GiB", "--reserve", "1M")
    assert "moe_intermediate_size = 128 does not split into 2 parts" in refused(capsys, *two)
    assert plan(capsys, *two, "--expert-parallel")[0] == 0


def test_a_checkpoint_is_planned_in_its_own_tiers(random_checkpoint: Path, capsys: Capture) -> None:
    code, out = plan(capsys, str(random_checkpoint), "--memory", "1GiB", "--reserve", "1M")
    assert code == 0
    assert "assumed" not in out.splitlines()[0]
    config = json.loads((random_checkpoint / "config.json").read_text(encoding="utf-8"))
    bits, weights = expert_bits(config)
    assert f"{bits:.3f} bits per expert weight" in out
    assert weights == 3 * 16 * 3 * 256 * 256
    assert plan(capsys, str(random_checkpoint / "config.json"), "--memory", "1GiB", "--reserve", "1M") == (0, out)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--gpus", "0"), "'0' is not a whole number of at least 1"),
        (("--memory", "much"), "'much' is not a size such as 500MiB or 4GiB"),
        (("--context", "202753"), "--context 202753: the model was made for at most 202752"),
        (("--bits", "0.5"), "--bits 0.5: out of reach; choose from 1.125 to 3.125 bits per routed-expert weight"),
        (("--bits", "nan"), "--bits nan: out of reach"),
        (("--tiers", "a=1,e=2"), "--tiers a=1,e=2: expected shares of a, b, c, d, each once"),
        (("--tiers", "a=1,a=2"), "expected shares of a, b, c, d, each once"),
        (("--tiers", "a=0"), "all shares are 0"),
        (("--tiers", "a=1", "--bits", "2"), "not allowed with argument"),
        (("--gpus", "3"), "tensor parallel size 3: "),
        (("--tiers", f"a={'9' * 400}"), "expected shares of a, b, c, d"),
        (("--json", "nowhere/plan.json"), "--json nowhere/plan.json: there is no folder nowhere"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(options: tuple[str, ...], problem: str, capsys: Capture) -> None:
    assert problem in refused(capsys, str(GEOMETRY), "--memory", "95GiB", *options)


def test_tiers_of_an_encoded_model_cannot_be_chosen(random_checkpoint: Path, capsys: Capture) -> None:
    for option in (("--bits", "2"), ("--tiers", "a=1")):
        line = refused(capsys, str(random_checkpoint), "--memory", "1GiB", *option)
        assert f"{option[0]}: {random_checkpoint} is encoded and has its own tiers; leave it out" in line


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "JSON"),
        ("[]", "expected a JSON object"),
        ('{"model_type": "llama"}', "model_type"),
        ("[" * 9999, "config.json"),
    ],
)
def test_a_damaged_configuration_is_refused_in_one_line(
    content: str, problem: str, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "config.json"
    file.write_text(content, encoding="utf-8")
    for path in (file, tmp_path):
        assert problem in refused(capsys, str(path), "--memory", "1GiB")
    assert "found nothing" in refused(capsys, str(tmp_path / "nowhere"), "--memory", "1GiB")


@pytest.mark.parametrize("dtype", [[], 0, "", {}, ["bfloat16"], "int8", False])
def test_a_dtype_that_is_none_is_refused(dtype: object, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "changed.json"
    file.write_text(json.dumps({**json.loads(GEOMETRY.read_text(encoding="utf-8")), "dtype": dtype}), encoding="utf-8")
    assert f"{file}: dtype: expected one of bfloat16" in refused(capsys, str(file), "--memory", "1GiB")


def test_a_file_that_is_another_is_called_by_its_name(random_checkpoint: Path, capsys: Capture) -> None:
    file = random_checkpoint / "tokenizer.json"
    assert f"error: {file}: model_type: expected" in refused(capsys, str(file), "--memory", "1GiB")


def test_the_mix_of_tiers_comes_to_the_bits_asked_for() -> None:
    config: dict[str, Any] = json.loads(GEOMETRY.read_text(encoding="utf-8"))
    for bits in (1.125, 1.4, 1.86, 2.25, 3.125):
        found, _ = expert_bits(assumed(config, mix_for(bits)))
        assert found == pytest.approx(bits, abs=1 / 256)
    assert read_mix("a=27,c=59,d=14") == pytest.approx({"a": 0.27, "c": 0.59, "d": 0.14})
    assert read_mix("a=1,b=0.5") == pytest.approx({"a": 2 / 3, "b": 1 / 3})
