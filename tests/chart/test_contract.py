"""Every command line that the chart renders is one that `vqserve serve` takes, and makes one that vLLM 0.32 takes."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from chart.helm import CI, objects, of_kind, rendered
from vqserve.cli import COMMANDS
from vqserve.format.files import read_config
from vqserve.format.geometry import Geometry
from vqserve.serve import server_command


def commands(values: Path) -> list[list[str]]:
    """Every command line of `vqserve` in the engine's pod, the engine's own last."""
    pod = of_kind("Deployment", objects(rendered("--values", values)))["spec"]["template"]["spec"]
    [engine] = pod["containers"]
    lines = [engine["lifecycle"]["preStop"]["exec"]["command"]]
    lines += [container["command"] + container["args"] for container in [*pod.get("initContainers", []), engine]]
    return [line[1:] for line in lines if line[0] == "vqserve"]


def parsed(words: list[str]) -> argparse.Namespace:
    """What the subcommand that is named first makes of the other words."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    import_module(COMMANDS[words[0]][0]).add_arguments(parser)
    own, passed = (words[1 : words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words[1:], [])
    return parser.parse_args(own, argparse.Namespace(passed=passed))


def vllm_options(values: Path, checkpoint: Path) -> argparse.Namespace:
    """What vLLM's own server understands when `vqserve serve` is given what is rendered."""
    args = parsed(commands(values)[-1])
    assert args.path == Path("/model")
    command = server_command(args, Geometry.from_dict(read_config(checkpoint)), cpu=None)
    options: argparse.Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(command[3:])
    return options


@pytest.mark.parametrize("values", CI, ids=lambda path: path.name)
def test_vqserve_takes_every_rendered_command_line(values: Path) -> None:
    lines = commands(values)
    assert [line[0] for line in lines] in (["drain", "preflight", "serve"], ["drain", "serve"])
    for line in lines:
        parsed(line)


@pytest.mark.parametrize("values", CI, ids=lambda path: path.name)
def test_the_preflight_judges_the_very_server_that_is_started(values: Path) -> None:
    *_, before, serve = [vars(parsed(line)) for line in commands(values)]
    if "mode" in before:
        assert {name: before[name] for name in serve if name in before} == {
            name: serve[name] for name in serve if name in before
        }
        assert {"max_model_len", "tensor_parallel_size", "attention", "passed", "path"} <= set(before)


@pytest.mark.parametrize("values", CI, ids=lambda path: path.name)
def test_vllm_takes_every_rendered_command_line(values: Path, demo_model: Path) -> None:
    options = vllm_options(values, demo_model)
    assert options.model == "/model"
    assert options.host == "0.0.0.0"
    assert options.port == 8001
    assert options.served_model_name == ["glm-5.2"]
    assert options.shutdown_timeout == 300


def test_the_options_after_the_dashes_reach_vllm(demo_model: Path) -> None:
    by_name = {path.name: path for path in CI}
    one = vllm_options(by_name["one-node-values.yaml"], demo_model)
    assert one.disable_custom_all_reduce
    assert one.enable_expert_parallel
    assert one.gpu_memory_utilization == 0.94
    assert one.tensor_parallel_size == 2
    three = vllm_options(by_name["three-replicas-values.yaml"], demo_model)
    assert three.max_model_len == 131072
    assert three.max_num_seqs == 32
    assert three.otlp_traces_endpoint == "http://collector.tracing:4317"
    assert not three.disable_custom_all_reduce
