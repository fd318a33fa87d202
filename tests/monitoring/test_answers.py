"""Prometheus's own promtool takes every query, and gives the answers that are meant to series made up for it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vqserve_ops.monitoring import queries
from vqserve_ops.monitoring.queries import Query, instant

pytestmark = pytest.mark.system

POD = "glm-vqserve-5d8f7c9b6d-x2x4z"
ENGINE = f'namespace="llm",service="glm-vqserve",pod="{POD}",model_name="glm",engine="0"'
OTHERS = ENGINE.replace("glm-vqserve", "other")

Series = dict[str, str]
"""Values at 0, 1, 2 ... minutes by series, as promtool writes them."""


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def rules(folder: Path, asked: list[Query]) -> Path:
    """A file, JSON being YAML, in which each query is a recording rule."""
    path = folder / "rules.yaml"
    made = [{"record": f"answer:{query.name}", "expr": instant(query, namespace="llm")} for query in asked]
    path.write_text(json.dumps({"groups": [{"name": "queries", "rules": made}]}), "utf-8")
    return path


def answers(query: Query, series: Series, expected: dict[str, float], folder: Path) -> None:
    """Compares a query's answer after ten minutes, in 1024ths: promtool would see the last bit of a double."""
    found: list[dict[str, Any]] = [{"labels": f"{{{labels}}}", "value": value} for labels, value in expected.items()]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": f"round(answer:{query.name}, 1 / 1024)", "eval_time": "10m", "exp_samples": found}
        ],
    }
    path = folder / "test.yaml"
    path.write_text(json.dumps({"rule_files": [rules(folder, [query]).name], "tests": [test]}), "utf-8")
    promtool("test", "rules", path)


def test_prometheus_takes_every_query(tmp_path: Path) -> None:
    promtool("check", "rules", rules(tmp_path, queries.all_queries()))


def test_tokens_are_those_of_one_release(tmp_path: Path) -> None:
    series = {
        f"vllm:generation_tokens_total{{{ENGINE}}}": "0+120x10",
        f"vllm:generation_tokens_total{{{OTHERS}}}": "0+600x10",
    }
    answers(queries.GENERATED, series, {"": 2}, tmp_path)


@pytest.mark.parametrize(
    "labels",
    [f'namespace="llm",pod="{POD}"', f'namespace="gpu",pod="dcgm-1",exported_namespace="llm",exported_pod="{POD}"'],
    ids=["the exporter's labels honoured", "renamed"],
)
def test_a_gpu_is_found_by_the_engines_pod(labels: str, tmp_path: Path) -> None:
    series = {
        f'DCGM_FI_DEV_FB_USED{{Hostname="a",gpu="0",{labels}}}': "90000x10",
        f'DCGM_FI_DEV_FB_USED{{Hostname="a",gpu="1",{labels.replace(POD, "somebody-else")}}}': "1x10",
    }
    answers(queries.GPU_USED, series, {'Hostname="a",gpu="0"': 90000}, tmp_path)


def test_a_checkpoints_volume_is_the_one_that_pods_have_as_model(tmp_path: Path) -> None:
    claims = "kube_pod_spec_volumes_persistentvolumeclaims_info"
    series = {
        'kubelet_volume_stats_available_bytes{namespace="llm",persistentvolumeclaim="weights"}': "5x10",
        'kubelet_volume_stats_available_bytes{namespace="llm",persistentvolumeclaim="kernels"}': "6x10",
        'kubelet_volume_stats_available_bytes{namespace="else",persistentvolumeclaim="weights"}': "7x10",
        f'{claims}{{namespace="llm",pod="{POD}",volume="model",persistentvolumeclaim="weights"}}': "1x10",
        f'{claims}{{namespace="llm",pod="{POD}",volume="cache",persistentvolumeclaim="kernels"}}': "1x10",
    }
    answers(queries.VOLUME_FREE, series, {'persistentvolumeclaim="weights"': 5}, tmp_path)


def test_goodput_is_the_least_share_that_can_have_met_all_thresholds(tmp_path: Path) -> None:
    """Of 16 requests a minute 14 met one threshold, 12 another and all the third: 10 to 12 met all."""
    within = {
        "vllm:time_to_first_token_seconds": ('le="5.0"', 14),
        "vllm:request_time_per_output_token_seconds": ('le="0.1"', 12),
        "vllm:e2e_request_latency_seconds": ('le="60.0"', 16),
    }
    series = {}
    for name, (bound, good) in within.items():
        series[f"{name}_bucket{{{ENGINE},{bound}}}"] = f"0+{good}x10"
        series[f"{name}_count{{{ENGINE}}}"] = "0+16x10"
    answers(queries.GOODPUT, series, {"": 10 / 16}, tmp_path)


def test_the_status_that_a_server_has_is_its_only_one(tmp_path: Path) -> None:
    series = {
        f'vqserve_server_status{{{ENGINE},status="ready"}}': "1x10",
        f'vqserve_server_status{{{ENGINE},status="stuck"}}': "0x10",
    }
    answers(queries.STATUS, series, {f'pod="{POD}",status="ready"': 1}, tmp_path)


def test_contexts_near_the_cap_are_those_past_nine_tenths(tmp_path: Path) -> None:
    series = {
        f'vqserve_context_share_bucket{{{ENGINE},le="0.9"}}': "0+15x10",
        f"vqserve_context_share_count{{{ENGINE}}}": "0+20x10",
    }
    answers(queries.NEAR_LIMIT, series, {"": 0.25}, tmp_path)


def test_tokens_in_the_kv_cache_are_summed_over_replicas_by_their_own_size(tmp_path: Path) -> None:
    second = ENGINE.replace("x2x4z", "y3y5w")
    series = {
        f"vllm:kv_cache_usage_perc{{{ENGINE}}}": "0.5x10",
        f"vllm:kv_cache_usage_perc{{{second}}}": "0.25x10",
        f"vqserve_kv_cache_capacity_tokens{{{ENGINE}}}": "1000x10",
        f"vqserve_kv_cache_capacity_tokens{{{second}}}": "2000x10",
    }
    answers(queries.KV_USED, series, {"": 1000}, tmp_path)
