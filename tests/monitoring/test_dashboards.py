"""The chart's dashboards ask only for what is exported, and are what `vqserve_ops.monitoring` makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.metrics.buckets import INTER_TOKEN_LATENCY_BUCKETS, REQUEST_LATENCY_BUCKETS, TIME_TO_FIRST_TOKEN_BUCKETS

from vqserve_ops.monitoring import dashboards, generate, queries
from vqserve_ops.monitoring.metrics import DCGM_DEFAULTS, METRICS, by_series
from vqserve_ops.monitoring.promql import metric_names, variables
from vqserve_ops.monitoring.queries import Query

FOLDER = Path(__file__).parents[2] / "charts" / "vqserve" / "files" / "dashboards"
MADE: dict[str, dict[str, Any]] = {name: json.loads(text) for name, text in generate.generated().items()}
PANELS: dict[str, dict[str, Any]] = {
    f"{name}: {panel['title']}": panel
    for name, dashboard in MADE.items()
    for panel in dashboard["panels"]
    if panel["type"] != "row"
}
QUERIES = {(query.expr, query.legend): query for query in queries.all_queries()}
GRAFANAS = {"__rate_interval", "__all"}

each_panel = pytest.mark.parametrize("panel", PANELS.values(), ids=PANELS)
each_query = pytest.mark.parametrize("query", queries.all_queries(), ids=lambda query: query.name)


def asked_by(panel: dict[str, Any]) -> list[Query]:
    return [QUERIES[target["expr"], target["legendFormat"]] for target in panel["targets"]]


def test_the_charts_dashboards_are_those_that_are_generated() -> None:
    there = {path.name: path.read_text("utf-8") for path in FOLDER.iterdir()}
    assert there == generate.generated(), "run `make chart`"


@each_panel
def test_a_panel_says_in_a_sentence_what_it_shows(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert ". " not in panel["description"]


@each_panel
def test_a_panel_asks_what_is_in_queries_with_that_unit_and_legend(panel: dict[str, Any]) -> None:
    assert {query.unit for query in asked_by(panel)} == {panel["fieldConfig"]["defaults"]["unit"]}
    assert all(query.unit and query.legend for query in asked_by(panel))
    assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_every_query_is_asked_by_some_panel() -> None:
    asked = {query.name for panel in PANELS.values() for query in asked_by(panel)}
    assert asked == {query.name for query in queries.all_queries()}


def test_no_two_queries_have_one_name() -> None:
    assert len({query.name for query in queries.all_queries()}) == len(queries.all_queries())


@each_query
def test_a_query_names_only_metrics_that_somebody_exports(query: Query) -> None:
    names = metric_names(query.expr)
    assert names
    assert names <= by_series().keys()


def test_every_metric_is_asked_for() -> None:
    asked = {by_series()[name].name for query in queries.all_queries() for name in metric_names(query.expr)}
    assert asked == {metric.name for metric in METRICS}


@each_query
def test_what_only_grows_is_asked_for_its_growth(query: Query) -> None:
    kinds = {by_series()[name].kind for name in metric_names(query.expr)}
    grows = "rate(" in query.expr or "increase(" in query.expr
    assert grows == bool(kinds - {"gauge"}) or query is queries.RESTARTS  # few: people want to see how many


@each_query
def test_a_query_looks_at_one_release_and_at_one_model_where_the_metric_knows_it(query: Query) -> None:
    for name in metric_names(query.expr):
        metric = by_series()[name]
        engines = metric.source in ("vllm", "vqserve")
        assert f"{name}{{{queries.ENGINE if engines else 'namespace='}" in query.expr
        assert (f"{name}{{{queries.MODEL}" in query.expr) == ("model_name" in metric.labels)


@each_query
def test_only_what_dcgm_is_asked_needs_a_gpu(query: Query) -> None:
    sources = {by_series()[name].source for name in metric_names(query.expr)}
    assert (sources == {"dcgm"}) == query.gpu_only
    assert query.gpu_only == ("dcgm" in sources)


@each_query
def test_an_instant_query_has_no_variable_left(query: Query) -> None:
    asked = queries.instant(query, "7m", namespace="llm", release="glm-vqserve")
    assert "$" not in asked
    assert ("[7m]" in asked) == ("[$__rate_interval]" in query.expr)
    assert metric_names(asked) == metric_names(query.expr)


def test_dcgms_exporter_has_what_is_asked_of_it_without_being_told() -> None:
    assert {metric.name for metric in METRICS if metric.source == "dcgm"} <= DCGM_DEFAULTS


@pytest.mark.parametrize("name", MADE)
def test_a_dashboard_has_the_variables_that_it_uses(name: str) -> None:
    there = {variable["name"] for variable in MADE[name]["templating"]["list"]}
    used = variables(json.dumps(MADE[name])) - GRAFANAS
    assert used <= there
    assert there - used <= {"model_name"}  # GPUs know none, and links hand on what was chosen


def test_variables_list_what_has_a_metric_of_ours() -> None:
    assert dashboards.MARK in by_series()


def test_uids_stay_as_they_are_because_links_hold_them() -> None:
    assert {name: dashboard["uid"] for name, dashboard in MADE.items()} == {
        "overview.json": "vqserve-overview",
        "context.json": "vqserve-context",
        "quality.json": "vqserve-quality",
        "gpus.json": "vqserve-gpus",
        "startup.json": "vqserve-startup",
    }


@pytest.mark.parametrize("name", MADE)
def test_panels_fill_the_grid_and_do_not_overlap(name: str) -> None:
    covered: list[tuple[int, int]] = []
    for panel in MADE[name]["panels"]:
        at = panel["gridPos"]
        covered += [(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])]
    bottom = 1 + max(y for _, y in covered)
    assert sorted(covered) == [(x, y) for x in range(24) for y in range(bottom)]


@pytest.mark.parametrize(
    ("offered", "known"),
    [
        pytest.param(dashboards.TTFT_BOUNDS, TIME_TO_FIRST_TOKEN_BUCKETS, id="ttft"),
        pytest.param(dashboards.TPOT_BOUNDS, INTER_TOKEN_LATENCY_BUCKETS, id="tpot"),
        pytest.param(dashboards.E2E_BOUNDS, REQUEST_LATENCY_BUCKETS, id="e2e"),
    ],
)
def test_thresholds_to_choose_are_bounds_of_vllms_histograms(
    offered: tuple[float, ...], known: tuple[float, ...]
) -> None:
    assert set(offered) <= set(known)
