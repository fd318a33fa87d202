"""What the monitoring asks for is there: a real Prometheus scrapes the demo's server under load, and answers."""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from chart.helm import CHART, objects, of_kind, rendered, written
from e2e.conftest import get, serving, wait_for
from monitoring.drawing import draw
from monitoring.elsewhere import DID_NOT_OCCUR, DOCUMENTED, UNANSWERED
from monitoring.load import asked
from monitoring.prometheus import LABELS, NAMESPACE, POD, RELEASE, Prometheus, Sample, watching
from monitoring.test_rules import WATCHED, rules_with
from vqserve.format.files import read_config
from vqserve_ops.monitoring import dashboards, generate, queries
from vqserve_ops.monitoring.metrics import METRICS, Metric, by_series
from vqserve_ops.monitoring.promql import filled_in, metric_names
from vqserve_ops.monitoring.queries import Query, instant
from vqserve_ops.monitoring.rules import Alert, Recording

pytestmark = [pytest.mark.system, pytest.mark.e2e, pytest.mark.timeout(600)]

PICTURES = Path(__file__).parents[2] / "docs" / "monitoring"
DRAWN = ("overview", "context", "quality")
PICTURE_BYTES = 200_000
LOAD_SECONDS, DRAWN_SECONDS = 45.0, 120.0
RULES = {rule.name: rule for group in generate.groups() for rule in group.rules}
ENGINES = {metric.name: metric for metric in METRICS if metric.source in ("vllm", "vqserve")}

each_query = pytest.mark.parametrize("query", queries.all_queries(), ids=lambda query: query.name)
each_recording = pytest.mark.parametrize("name", [name for name in RULES if isinstance(RULES[name], Recording)])
each_alert = pytest.mark.parametrize("name", [name for name in RULES if isinstance(RULES[name], Alert)])
each_metric = pytest.mark.parametrize("metric", ENGINES.values(), ids=ENGINES)


@dataclass(frozen=True)
class Seen:
    """What became of a server under load.

    Attributes:
        prometheus: Scraped it from before it was ready until after the load.
        ready: When it was ready, in seconds since the epoch.
        end: When the load was over.
        rules: Expressions of the chart's rules for this release, by name.
        families: The last of `/metrics`, by name; a counter's is without `_total`.
    """

    prometheus: Prometheus
    ready: float
    end: float
    rules: dict[str, str]
    families: dict[str, Family]

    def answers(self, expr: str) -> list[Sample]:
        """Series of a query, as of the load's end, that have a number."""
        found = self.prometheus.samples(expr, self.end)
        return [sample for sample in found if math.isfinite(float(sample["value"][1]))]


@pytest.fixture(scope="module")
def seen(demo_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Seen]:
    """The demo's server with both safety nets, after its load."""
    seconds = DRAWN_SECONDS if request.config.getoption("--draw") else LOAD_SECONDS
    spec = rules_with(WATCHED, tmp_path_factory.mktemp("values"))
    rules = written(spec, tmp_path_factory.mktemp("rules"))
    by_name = {rule.get("alert") or rule["record"]: rule["expr"] for group in spec["groups"] for rule in group["rules"]}
    limit = read_config(demo_model)["max_position_embeddings"]
    nets = ("--anti-repetition", "1", "--thinking-budget", "24")
    with (
        serving(demo_model, tmp_path_factory.mktemp("server"), *nets) as server,
        watching(server.url, rules, tmp_path_factory.mktemp("prometheus")) as prometheus,
    ):
        wait_for(server, "/ready", 200)
        ready = time.time()
        asked(server.client, limit, seconds, seed=random.randrange(1 << 32))
        end = time.time()
        prometheus.wait_until(lambda: bool(prometheus.samples(f"timestamp(up) > {end}", time.time())))
        families = {family.name: family for family in text_string_to_metric_families(get(server, "/metrics")[1])}
        yield Seen(prometheus, ready, end, by_name, families)


def selectors(expr: str) -> list[tuple[str, str]]:
    """Every metric of an expression with its matchers."""
    found = re.findall(r'([A-Za-z_:][\w:]*)\{((?:[^"{}]|"[^"]*")*)\}', expr)
    assert {name for name, _ in found} == metric_names(expr)
    return found


def is_documented(name: str, labels: set[str]) -> bool:
    """Whether somebody else than the engine exports that, by what they say themselves."""
    return any(labels <= of[name] for of in DOCUMENTED.values() if name in of)


def test_a_target_has_the_labels_that_the_charts_servicemonitor_gives(seen: Seen) -> None:
    [target] = seen.prometheus.answer("targets", state="active")["activeTargets"]
    assert target["labels"].items() >= LABELS.items()
    [up] = seen.answers("up")
    assert up["value"][1] == "1"


@each_query
def test_a_panels_query_is_answered(query: Query, seen: Seen) -> None:
    found = seen.answers(instant(query, "1m", namespace=NAMESPACE, release=RELEASE))
    if source := UNANSWERED.get(query.name):
        assert not found, "it is answered: take it off the list"
        assert source in {by_series()[name].source for name in metric_names(query.expr)}
    elif query.name in DID_NOT_OCCUR and seen.answers(DID_NOT_OCCUR[query.name]):
        assert not found, "it is answered: take it off the list"
        assert all(seen.answers(name) for name in metric_names(query.expr))
    else:
        assert found
        legends = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
        assert all(legends <= sample["metric"].keys() for sample in found)


def test_only_queries_that_there_are_may_be_unanswered() -> None:
    assert UNANSWERED.keys() | DID_NOT_OCCUR.keys() <= {query.name for query in queries.all_queries()}


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric.source in DOCUMENTED], ids=lambda m: m.name)
def test_what_others_export_is_as_they_document_it(metric: Metric) -> None:
    assert set(metric.labels) <= DOCUMENTED[metric.source][metric.name]


@pytest.mark.parametrize(
    ("variable", "label", "found"), [("namespace", "namespace", NAMESPACE), ("release", "service", RELEASE)]
)
def test_dashboards_find_the_release(variable: str, label: str, found: str, seen: Seen) -> None:
    overview = json.loads(generate.generated()["overview.json"])
    [asked_for] = [each["query"] for each in overview["templating"]["list"] if each["name"] == variable]
    [metric] = re.findall(r"^label_values\((.*), " + label + r"\)$", asked_for)
    match = filled_in(metric, {"namespace": NAMESPACE})
    assert seen.prometheus.answer(f"label/{label}/values", **{"match[]": match}) == [found]


def test_prometheus_evaluates_every_rule_without_an_error(seen: Seen) -> None:
    found = [rule for group in seen.prometheus.answer("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in found} == RULES.keys()
    assert {rule["name"]: rule.get("lastError") for rule in found if rule["health"] != "ok"} == {}


@each_recording
def test_a_recording_rule_records_numbers(name: str, seen: Seen) -> None:
    assert seen.answers(seen.rules[name])
    [recorded] = seen.answers(name)
    assert recorded["metric"].items() >= {"namespace": NAMESPACE, "service": RELEASE}.items()


@each_alert
def test_an_alert_asks_for_what_there_is_or_what_others_document(name: str, seen: Seen) -> None:
    seen.prometheus.samples(seen.rules[name], seen.end)
    for metric, matchers in selectors(seen.rules[name]):
        found = seen.answers(f"{metric}{{{matchers}}}")
        documented = is_documented(metric, set(re.findall(r"(\w+)\s*[=!]~?", matchers)))
        assert bool(found) != documented, f"{metric}{{{matchers}}}"


def test_an_autoscaler_is_told_how_many_requests_wait(seen: Seen, tmp_path: Path) -> None:
    example = yaml.safe_load((CHART / "ci" / "autoscaling-values.yaml").read_text("utf-8"))
    scaled = of_kind("ScaledObject", objects(rendered("--values", written(example, tmp_path))))
    [trigger] = scaled["spec"]["triggers"]
    [waiting] = seen.answers(trigger["metadata"]["query"])
    assert float(waiting["value"][1]) >= 0


def test_the_metrics_adapter_finds_the_autoscalers_metric_by_pod(seen: Seen, tmp_path: Path) -> None:
    """Colons, which no name in Kubernetes may have, stand as underscores there."""
    example: dict[str, Any] = {"model": WATCHED["model"], "autoscaling": {"kind": "hpa", "maxReplicas": 4}}
    scaler = of_kind("HorizontalPodAutoscaler", objects(rendered("--values", written(example, tmp_path))))
    [metric] = scaler["spec"]["metrics"]
    series = metric["pods"]["metric"]["name"].replace("vllm_", "vllm:", 1)
    assert seen.answers(f'{series}{{namespace="{NAMESPACE}",pod="{POD}"}}')


@each_metric
def test_the_server_exports_what_dashboards_know_with_that_type_and_these_labels(metric: Metric, seen: Seen) -> None:
    family = seen.families[metric.name.removesuffix("_total")]
    assert family.type == metric.kind
    labels = {frozenset(sample.labels.keys() - {"le"}) for sample in family.samples}
    assert labels == {frozenset(metric.labels)}


def test_dashboards_know_everything_of_ours_that_the_server_exports(seen: Seen) -> None:
    ours = {name for name in seen.families if name.startswith("vqserve_") and not name.endswith("_created")}
    assert ours == {name.removesuffix("_total") for name in ENGINES if name.startswith("vqserve_")}


def test_a_request_that_its_client_gave_up_is_in_no_count_of_vllms(seen: Seen) -> None:
    """If it is one day: the panel "Failed" says that it is not."""
    [aborted] = seen.answers('vqserve_finished_requests_total{cause="abort"}')
    [like_vllms] = seen.answers('vllm:request_success_total{finished_reason="abort"}')
    assert aborted["value"][1] == like_vllms["value"][1] == "0"


@pytest.mark.parametrize("name", DRAWN)
def test_a_dashboard_is_drawn_as_a_picture(
    name: str, seen: Seen, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    [page] = [page for page in dashboards.PAGES if page.name == name]
    folder = PICTURES if request.config.getoption("--draw") else tmp_path
    picture = folder / f"{name}.png"
    empty = draw(picture, page, seen.prometheus, seen.ready, seen.end)
    assert empty == [] or (empty == ["Prefix cache"] and seen.answers(DID_NOT_OCCUR["prefix_cache_hit_rate"]))
    assert 10_000 < picture.stat().st_size <= PICTURE_BYTES
