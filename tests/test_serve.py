"""`vqserve serve` up to the moment it becomes vLLM's server; from there on see e2e."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

import vqserve
from random_checkpoint import make_random_checkpoint
from random_parent import make_random_parent
from vqserve.cli import main
from vqserve.format.manifest import write_manifest
from vqserve.installation import PLUGINS
from vqserve.settings import ANTI_REPETITION, SPINE, THINKING_BUDGET

Capture = pytest.CaptureFixture[str]


def printed(capsys: Capture, *argv: str) -> tuple[dict[str, str], list[str]]:
    """Environment and arguments that `--print` shows."""
    own, passed = (argv[: argv.index("--")], argv[argv.index("--") :]) if "--" in argv else (argv, ())
    assert main(["serve", *own, "--print", *passed]) == 0
    words = shlex.split(capsys.readouterr().out)
    at = words.index(sys.executable)
    return dict(word.split("=", 1) for word in words[:at]), words[at:]


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def refused(capsys: Capture, *argv: str) -> str:
    """The one line on stderr with which `serve` ends."""
    assert main(["serve", *argv]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    return error


def test_the_defaults_are_those_of_the_model_card(random_checkpoint: Path, capsys: Capture) -> None:
    environment, command = printed(capsys, str(random_checkpoint))
    expected = {
        "--model": str(random_checkpoint),
        "--host": "127.0.0.1",
        "--port": "8001",
        "--served-model-name": "glm-5.2",
        "--max-model-len": "4096",
        "--tensor-parallel-size": "1",
        "--reasoning-parser": "glm45",
        "--tool-call-parser": "glm47",
        "--hf-overrides": '{"architectures": ["GlmMoeDsaDenseForCausalLM"]}',
    }
    assert {option: value(command, option) for option in expected} == expected
    assert "--enable-auto-tool-choice" in command
    assert environment["HF_HUB_OFFLINE"] == environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_every_default_can_be_overridden(random_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    options = {
        "--host": "0.0.0.0",
        "--port": "9000",
        "--served-model-name": "other",
        "--max-model-len": "512",
        "--tensor-parallel-size": "2",
        "--reasoning-parser": "glm47",
        "--tool-call-parser": "glm45",
        "--chat-template": str(template),
    }
    environment, command = printed(capsys, str(random_checkpoint), *(word for item in options.items() for word in item))
    assert {option: value(command, option) for option in options} == options
    ranks = environment["VLLM_CPU_OMP_THREADS_BIND"].split("|")
    cores = [core for rank in ranks for core in rank.split(",")]
    assert len(ranks) == 2
    assert len(set(cores)) == len(cores)


def pretend(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    """Has torch, and so vLLM, find a CPU of these features."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True))


@pytest.mark.parametrize(
    ("features", "setting", "spine", "dtype"),
    [
        (("avx2",), None, "dequantized", "float32"),
        (("avx2", "avx512_f"), None, "dequantized", "float32"),
        (("avx2", "avx512_f"), "packed", "packed", "auto"),
        (("avx2", "avx512_f", "avx512_bf16"), None, "packed", "auto"),
        (("avx2", "avx512_f", "avx512_bf16"), "dequantized", "dequantized", "auto"),
    ],
)
def test_a_cpu_serves_in_what_it_multiplies_fast(
    features: tuple[str, ...],
    setting: str | None,
    spine: str,
    dtype: str,
    random_checkpoint: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, *features)
    if setting:
        monkeypatch.setenv(SPINE, setting)
    environment, command = printed(capsys, str(random_checkpoint))
    assert environment[SPINE] == spine
    assert value(command, "--dtype") == dtype


def test_a_cpu_without_avx2_is_refused_in_one_line(
    random_checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "avx")
    assert "this CPU has no AVX2" in refused(capsys, str(random_checkpoint))


@pytest.mark.parametrize(("setting", "says"), [("packed", "no 4-bit GEMM"), ("4bit", "expected packed or dequantized")])
def test_a_spine_that_cannot_be_is_refused(
    setting: str, says: str, random_checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "avx2")
    monkeypatch.setenv(SPINE, setting)
    error = refused(capsys, str(random_checkpoint))
    assert f"{SPINE}={setting}: " in error
    assert says in error


def test_a_parent_is_served_as_it_is_with_the_same_settings(
    random_parent: Path, random_checkpoint: Path, capsys: Capture
) -> None:
    environment, command = printed(capsys, str(random_parent), "--bf16")
    expected, other = printed(capsys, str(random_checkpoint))
    assert environment == expected
    assert command == [str(random_parent) if word == str(random_checkpoint) else word for word in other]
    assert "quantized already" in refused(capsys, str(random_checkpoint), "--bf16")


def test_what_follows_the_dashes_goes_to_vllm_as_it_is(random_checkpoint: Path, capsys: Capture) -> None:
    passed = ["--seed", "7", "--enable-log-requests", "--hf-overrides", '{"a b": "$c"}', "--", "x"]
    _, command = printed(capsys, str(random_checkpoint), "--", *passed)
    assert command[-len(passed) :] == passed


def test_the_callers_environment_wins(
    random_checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert printed(capsys, str(random_checkpoint))[0]["VLLM_CPU_KVCACHE_SPACE"] == "3"


def test_secrets_are_never_shown(random_checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "hush-1")
    argv = ["serve", str(random_checkpoint), "--print", "--", "--api-key", "hush-2", "hush-3", "--api_key=hush-4"]
    argv += ["--api-ke", "hush-5", "--hf-token", "hush-6", "--ssl-keyfile-password=hush-7"]
    assert main(argv) == 0
    assert "hush" not in capsys.readouterr().out


@pytest.mark.parametrize("key", ["hush\n", "hüsh"])
def test_a_key_that_no_client_can_send_is_refused_and_not_shown(
    key: str, random_checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    error = refused(capsys, str(random_checkpoint))
    assert "VLLM_API_KEY: expected printable ASCII" in error
    assert key.strip() not in error


def test_a_bf16_checkpoint_is_to_be_encoded_first(random_parent: Path, capsys: Capture) -> None:
    error = refused(capsys, str(random_parent))
    assert "the checkpoint is not quantized" in error
    assert "vqserve encode" in error


def test_a_flipped_bit_is_found_before_the_start(random_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = shutil.copytree(random_checkpoint, tmp_path / "checkpoint")
    file = folder / "model-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert f"{file}: " in refused(capsys, str(folder))


def test_a_taken_port_is_found_before_the_start(random_checkpoint: Path, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused(capsys, str(random_checkpoint), "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in error


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--port", "70000"), "--port 70000: expected 1..65535"),
        (("--host", "192.0.2.1"), "cannot listen on 192.0.2.1:8001"),
        (("--tensor-parallel-size", "3"), "tensor parallel size 3: num_attention_heads = 2 is not a multiple"),
        (("--tensor-parallel-size", "0"), "tensor parallel size 0"),
        (("--tensor-parallel-size", "1000000000"), "tensor parallel size 1000000000: num_attention_heads = 2"),
        (("--max-model-len", "5000"), "--max-model-len 5000: expected 1..4096"),
        (("--chat-template", "nowhere.jinja"), "--chat-template nowhere.jinja: no such file; name one"),
        (("--attention", "sparse"), "no sparse attention on CPUs"),
    ],
)
def test_an_impossible_value_is_refused(
    options: tuple[str, str], problem: str, random_checkpoint: Path, capsys: Capture
) -> None:
    assert problem in refused(capsys, str(random_checkpoint), *options)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("VLLM_CPU_KVCACHE_SPACE", text) for text in ("x", "", "1.5", "-1", "\u0661", "9" * 400)),
        *(("VQSERVE_WARM_UP_SECONDS", text) for text in ("x", "nan", "inf", "-1", "0", "1e999")),
    ],
)
def test_a_variable_that_vllm_would_refuse_after_loading_is_refused_before(
    name: str, text: str, random_checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    line = refused(capsys, str(random_checkpoint), "--print")
    assert f"{name}={text}: expected a" in line
    assert "or unset it" in line


def test_a_port_out_of_range_is_not_printed(random_checkpoint: Path, capsys: Capture) -> None:
    assert "--port 99999: expected 1..65535" in refused(capsys, str(random_checkpoint), "--port", "99999", "--print")


@pytest.mark.parametrize("content", [b"{% if", b"\xff"])
def test_a_chat_template_of_one_s_own_has_to_be_one(
    content: bytes, random_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "own.jinja").write_bytes(content)
    line = refused(capsys, str(random_checkpoint), "--chat-template", str(tmp_path / "own.jinja"), "--print")
    assert f"{tmp_path / 'own.jinja'}: expected" in line


def test_experts_that_cannot_be_split_need_expert_parallelism(tmp_path: Path, capsys: Capture) -> None:
    parent = make_random_parent(tmp_path / "parent", num_hidden_layers=2, moe_intermediate_size=128, n_shared_experts=2)
    checkpoint = str(make_random_checkpoint(parent, tmp_path / "checkpoint"))
    two = ("--tensor-parallel-size", "2")
    assert "moe_intermediate_size = 128 does not split into 2 parts" in refused(capsys, checkpoint, *two)
    _, command = printed(capsys, checkpoint, *two, "--", "--enable-expert-parallel")
    assert value(command, "--tensor-parallel-size") == "2"


def test_more_ranks_than_cores_are_refused(random_checkpoint: Path) -> None:
    pinned = f"import os; os.sched_setaffinity(0, {{0}}); {RUN}"
    done = run(pinned, "serve", str(random_checkpoint), "--tensor-parallel-size", "2")
    assert done.stderr == "vqserve: error: --tensor-parallel-size 2: 1 CPU cores for that many ranks; use at most 1\n"


RUN = "import sys; from vqserve.cli import main; sys.exit(main(sys.argv[1:]))"


def run(code: str, *argv: str, flags: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *flags, "-c", code, *argv],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 2
    return done


def installed(folder: Path, name: str, version: str) -> None:
    """Makes `folder` hold a distribution's metadata."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


def test_another_version_of_vllm_is_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    installed(tmp_path, "vllm", "0.33.0")
    done = run(RUN, "serve", str(random_checkpoint), PYTHONPATH=str(tmp_path))
    assert done.stderr.startswith("vqserve: error: vLLM 0.32.0 is needed, found 0.33.0;")


@pytest.mark.parametrize(("vllm", "problem"), [(False, "vLLM 0.32.0 is needed, found none;"), (True, "not found;")])
def test_an_incomplete_installation_is_refused(
    vllm: bool, problem: str, random_checkpoint: Path, tmp_path: Path
) -> None:
    # Without site-packages, where both are installed. Up to here `serve` needs the standard library alone.
    (tmp_path / "vqserve").symlink_to(Path(vqserve.__file__).parent)
    if vllm:
        installed(tmp_path, "vllm", "0.32.0")
    done = run(RUN, "serve", str(random_checkpoint), flags=("-S",), PYTHONPATH=str(tmp_path))
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("named", "others"),
    [(None, ""), ("", ""), ("lora_filesystem_resolver", ",lora_filesystem_resolver"), ("vqserve,x", ",x")],
)
def test_vllm_is_told_of_our_plugins_and_of_those_the_caller_names(
    named: str | None, others: str, random_checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    assert printed(capsys, str(random_checkpoint))[0]["VLLM_PLUGINS"] == f"{','.join(PLUGINS)}{others}"


def test_every_plugin_of_ours_is_named_to_vllm() -> None:
    points = distribution("vqserve").entry_points
    assert {point.name: point.group for point in points if point.group.startswith("vllm.")} == PLUGINS


def test_the_time_for_the_warm_up_can_be_set(
    random_checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VQSERVE_WARM_UP_SECONDS", "1")
    environment, _ = printed(capsys, str(random_checkpoint), "--warm-up-seconds", "90")
    assert environment["VQSERVE_WARM_UP_SECONDS"] == "90"
    assert "VQSERVE_WARM_UP_SECONDS" not in printed(capsys, str(random_checkpoint))[0]


def test_no_safety_net_is_there_unless_configured(
    random_checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (ANTI_REPETITION, THINKING_BUDGET):
        monkeypatch.delenv(name, raising=False)
    environment, command = printed(capsys, str(random_checkpoint))
    assert "--logits-processors" not in command
    assert not {ANTI_REPETITION, THINKING_BUDGET} & environment.keys()


@pytest.mark.parametrize(
    ("option", "name", "text"),
    [
        ("--anti-repetition", ANTI_REPETITION, "0"),
        ("--anti-repetition", ANTI_REPETITION, "0.5,16"),
        ("--thinking-budget", THINKING_BUDGET, "4096"),
    ],
)
def test_a_safety_net_is_named_to_vllm(
    option: str, name: str, text: str, random_checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, command = printed(capsys, str(random_checkpoint), option, text)
    assert environment[name] == text
    assert value(command, "--logits-processors") == "vqserve.vllm_plugin.nets_cpu:SafetyNets"
    monkeypatch.setenv(name, text)
    assert value(printed(capsys, str(random_checkpoint))[1], "--logits-processors").startswith("vqserve.")


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "101", "1,0", "1,16,16", "1,16,99999", "1,2,3,4", "\u0661"])
def test_a_penalty_that_cannot_be_is_refused(
    text: str, random_checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = "expected STRENGTH[,MIN_LENGTH[,WINDOW]]"
    line = refused(capsys, str(random_checkpoint), f"--anti-repetition={text}")
    assert line.startswith("vqserve: error: --anti-repetition ")
    assert expected in line
    if text:
        monkeypatch.setenv(ANTI_REPETITION, text)
        assert expected in refused(capsys, str(random_checkpoint), "--print")


def test_a_logits_processor_of_one_s_own_does_not_silently_displace_the_nets(
    random_checkpoint: Path, capsys: Capture
) -> None:
    own = ("--", "--logits-processors", "own:Processor")
    line = refused(capsys, str(random_checkpoint), "--anti-repetition", "1", "--print", *own)
    assert "--logits-processors would take the place of --anti-repetition and --thinking-budget" in line
    assert value(printed(capsys, str(random_checkpoint), *own)[1], "--logits-processors") == "own:Processor"


def test_known_answers_that_cannot_be_read_are_found_before_the_start(
    random_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = shutil.copytree(random_checkpoint, tmp_path / "checkpoint")
    (folder / "known_answers.json").write_text('{"version": 1, "prompts": []}', encoding="utf-8")
    write_manifest(folder)
    assert "known_answers.json: prompts: expected a list with at least one prompt" in refused(capsys, str(folder))
