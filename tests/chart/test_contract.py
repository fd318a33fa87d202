"""Every command line that the chart renders is one that `vqserve serve` takes, and makes one that vLLM 0.32 takes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from chart.helm import CI, objects, of_kind, rendered
from vqserve.format.files import read_config
from vqserve.format.geometry import Geometry
from vqserve.serve import add_arguments, server_command


def engine_words(values: Path) -> list[str]:
    [engine] = of_kind("Deployment", objects(rendered("--values", values)))["spec"]["template"]["spec"]["containers"]
    assert engine["command"] == ["vqserve"]
    assert engine["args"][0] == "serve"
    words: list[str] = engine["args"][1:]
    return words


def vllm_options(words: list[str], checkpoint: Path) -> argparse.Namespace:
    """What vLLM's own server understands when `vqserve serve` is given these words."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    at = words.index("--")
    args = parser.parse_args(words[:at], argparse.Namespace(passed=words[at + 1 :]))
    assert args.path == Path("/model")
    command = server_command(args, Geometry.from_dict(read_config(checkpoint)), cpu=None)
    options: argparse.Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(command[3:])
    return options


@pytest.mark.parametrize("values", CI, ids=lambda path: path.name)
def test_vllm_takes_every_rendered_command_line(values: Path, demo_model: Path) -> None:
    options = vllm_options(engine_words(values), demo_model)
    assert options.model == "/model"
    assert options.host == "0.0.0.0"
    assert options.port == 8001
    assert options.served_model_name == ["glm-5.2"]
    assert options.shutdown_timeout == 300


def test_the_options_after_the_dashes_reach_vllm(demo_model: Path) -> None:
    by_name = {path.name: path for path in CI}
    one = vllm_options(engine_words(by_name["one-node-values.yaml"]), demo_model)
    assert one.disable_custom_all_reduce
    assert one.enable_expert_parallel
    assert one.gpu_memory_utilization == 0.94
    assert one.tensor_parallel_size == 2
    three = vllm_options(engine_words(by_name["three-replicas-values.yaml"]), demo_model)
    assert three.max_model_len == 131072
    assert three.max_num_seqs == 32
    assert three.otlp_traces_endpoint == "http://collector.tracing:4317"
    assert not three.disable_custom_all_reduce
