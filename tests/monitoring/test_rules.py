"""Alerts and recording rules: the file is what Python makes, each alert has a runbook, and promtool's cases hold."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm.v1.metrics import buckets

import values
from chart.helm import CHART, Object, objects, of_kind, rendered, written
from vqserve import cli as vqserve_cli
from vqserve_ops import cli as ops_cli
from vqserve_ops.monitoring import generate
from vqserve_ops.monitoring.rules import PLACEHOLDERS, Alert

ROOT = Path(__file__).parents[2]
RUNBOOKS = sorted((ROOT / "ops/runbooks").glob("*.md"))
CASES = sorted((Path(__file__).parent / "rules").glob("*.yaml"))
ALERTS = {rule.name: rule for group in generate.groups() for rule in group.rules if isinstance(rule, Alert)}
WATCHED: Object = {
    "model": {"pvc": {"claimName": "glm-5.2-vq"}},
    "cache": {"kind": "pvc"},
    "monitoring": {"serviceMonitor": {"enabled": True}, "rules": {"enabled": True}},
}

each_alert = pytest.mark.parametrize("name", ALERTS)
each_runbook = pytest.mark.parametrize("runbook", RUNBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The rules as the chart hands them to Prometheus, by default values."""
    return rules_with(WATCHED, tmp_path_factory.mktemp("values"))


def rules_with(wanted: Object, tmp_path: Path) -> dict[str, Any]:
    spec: dict[str, Any] = of_kind("PrometheusRule", objects(rendered("--values", written(wanted, tmp_path))))["spec"]
    return spec


def text_of(spec: dict[str, Any]) -> str:
    """Queries, durations and annotations, without YAML's quoting."""
    rules = [rule for group in spec["groups"] for rule in group["rules"]]
    parts = [[rule["expr"], f"for: {rule.get('for')}", *rule.get("annotations", {}).values()] for rule in rules]
    return "\n".join(part for of_rule in parts for part in of_rule)


def checks() -> list[tuple[str, Object, Object]]:
    """Of every case of promtool: the alert, the case and the check."""
    tests = [test for path in CASES for test in yaml.safe_load(path.read_text("utf-8"))["tests"]]
    return [(check["alertname"], test, check) for test in tests for check in test["alert_rule_test"]]


def test_the_charts_rules_are_what_python_makes() -> None:
    assert (CHART / "files/rules.yaml").read_text("utf-8") == generate.rules(), "run `make chart`"


def test_the_file_has_no_placeholder_but_those_that_the_chart_fills_in() -> None:
    assert set(re.findall(r"\$\{(\w+)\}", generate.rules())) == set(PLACEHOLDERS)


def test_the_chart_fills_in_every_placeholder_and_leaves_prometheus_its_braces(filled: dict[str, Any]) -> None:
    text = text_of(filled)
    assert "${" not in text
    assert "{{ $labels.namespace }}/{{ $labels.pod }}" in text
    assert 'namespace="llm",service="demo-vqserve"' in text
    assert 'persistentvolumeclaim=~"glm-5[.]2-vq|demo-vqserve-cache"' in text


def test_what_operators_set_is_in_the_rules(tmp_path: Path) -> None:
    rules = {
        "enabled": True,
        "runbooks": "https://wiki.example/runbooks",
        "slo": {"ttftSeconds": 10, "interTokenSeconds": 0.075, "objective": 0.999},
        "stallSeconds": 240,
        "waitingRequests": 5,
    }
    slow_start = {"probes": {"startup": {"budgetSeconds": 1234}}}
    watched = {"monitoring": {"serviceMonitor": {"enabled": True}, "rules": rules}}
    text = text_of(rules_with(WATCHED | watched | slow_start, tmp_path))
    for part in (
        'le="10.0"',
        'le="0.075"',
        "14.4 * (1 - 0.999)",
        "> 240",
        "[15m]) > 5",
        "for: 1234s",
        "https://wiki.example/runbooks/VqserveNoTokens.md",
    ):
        assert part in text, part


def test_bounds_of_promises_are_those_of_vllms_histograms() -> None:
    assert values.TTFT_BOUNDS == buckets.TIME_TO_FIRST_TOKEN_BUCKETS
    assert values.INTER_TOKEN_BOUNDS == buckets.INTER_TOKEN_LATENCY_BUCKETS


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    assert {path.stem for path in RUNBOOKS} == set(ALERTS)


@each_alert
def test_an_alert_has_a_case_that_fires_and_one_for_silence_on_its_own_metrics(name: str) -> None:
    metrics = set(re.findall(r"\b((?:vllm|vqserve|kube|kubelet|DCGM)[:_]\w+|up)\b", ALERTS[name].expr))
    recorded = "vqserve:" in ALERTS[name].expr  # then the case feeds what is recorded from
    found = [(test, check) for alert, test, check in checks() if alert == name]
    fed = [
        check
        for test, check in found
        if recorded or metrics & {series["series"].partition("{")[0] for series in test["input_series"]}
    ]
    assert any(check["exp_alerts"] for check in fed)
    assert any(not check["exp_alerts"] for check in fed)


def test_every_case_is_of_an_alert_that_there_is() -> None:
    assert {alert for alert, _, _ in checks()} == set(ALERTS)


@each_runbook
def test_a_runbook_says_what_to_know_in_the_same_order(runbook: Path) -> None:
    headings = re.findall(r"^## (.+)$", runbook.read_text("utf-8"), re.MULTILINE)
    assert headings == ["What it means", "What users see", "How to confirm", "What to do", "What usually causes it"]


@each_runbook
def test_the_commands_of_a_runbook_are_there(runbook: Path) -> None:
    text = runbook.read_text("utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert lines
    spans = re.findall(r"`((?:vqserve|vqserve-ops) [a-z][^`]*)`", text)
    for line in [*lines, *spans]:
        words = shlex.split(line, comments=True)
        exec_of = words.index("--") + 1 if words[:2] == ["kubectl", "exec"] else 0
        program, command = words[exec_of : exec_of + 2] if len(words) > exec_of + 1 else (words[0], "")
        assert words[0] in ("kubectl", "helm", "vqserve", "vqserve-ops"), line
        if program == "vqserve-ops":
            assert command in ops_cli.COMMANDS, line
            if words[2:]:  # else it is only spoken of
                ops_cli._parser([command]).parse_args(words[1:])
        elif program == "vqserve":
            assert command in vqserve_cli.COMMANDS, line
        elif program == "helm":
            assert command in ("get", "history", "list", "rollback", "status", "upgrade"), line
    verbs = set(re.findall(r"kubectl (\w+)", text))
    assert verbs <= {"delete", "describe", "exec", "get", "logs", "rollout", "scale", "top"}


def promtool(*arguments: str | Path) -> None:
    program = shutil.which("promtool")
    assert program, "no promtool: Debian has it in the package prometheus"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.system
def test_promtool_takes_the_rules(filled: dict[str, Any], tmp_path: Path) -> None:
    promtool("check", "rules", written(filled, tmp_path))


@pytest.mark.system
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_promtools_cases_hold(cases: Path, filled: dict[str, Any], tmp_path: Path) -> None:
    written(filled, tmp_path).rename(tmp_path / "rules.yaml")
    promtool("test", "rules", shutil.copy(cases, tmp_path))


@pytest.mark.system
@each_runbook
def test_promtool_takes_a_runbooks_queries(runbook: Path, tmp_path: Path) -> None:
    queries = re.findall(r"```promql\n(.*?)```", runbook.read_text("utf-8"), re.DOTALL)
    assert queries
    rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(queries)]
    promtool("check", "rules", written({"groups": [{"name": "runbook", "rules": rules}]}, tmp_path))
