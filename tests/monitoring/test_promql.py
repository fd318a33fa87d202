from __future__ import annotations

import pytest

from vqserve_ops.monitoring.promql import filled_in, metric_names, variables


@pytest.mark.parametrize(
    ("expr", "names"),
    [
        ("up", {"up"}),
        ('vllm:requests{a="x",b=~"y|z"}', {"vllm:requests"}),
        ("sum by (le, pod) (rate(a_bucket[5m]))", {"a_bucket"}),
        ("sum(rate(a_total[$__rate_interval])) by (pod)", {"a_total"}),
        ("vqserve:requests_waiting:sum > 3", {"vqserve:requests_waiting:sum"}),
        ("a * on (pod) group_left (node) b and ignoring (x) c", {"a", "b", "c"}),
        ("a * on (pod) group_left b unless c or d", {"a", "b", "c", "d"}),
        ("a > bool 1e3 offset 5m == Inf != NaN", {"a"}),
        ("max_over_time(a[10m:30s]) - time()", {"a"}),
        ('a{b="c{d}[e]"} + label_replace(f, "g", "h", "i", "j")', {"a", "f"}),
        ("1 - 2 * 3.5", set()),
    ],
)
def test_names_in_an_expression_are_metrics_not_labels_or_functions(expr: str, names: set[str]) -> None:
    assert metric_names(expr) == names


def test_variables_are_found_in_both_spellings_and_filled_in() -> None:
    expr = 'a{pod=~"${release}-[a-z]{5}",b="$b"}[$__rate_interval]'
    assert variables(expr) == {"release", "b", "__rate_interval"}
    values = {"release": "glm", "b": "c", "__rate_interval": "5m"}
    assert filled_in(expr, values) == 'a{pod=~"glm-[a-z]{5}",b="c"}[5m]'


def test_a_variable_without_a_value_is_an_error() -> None:
    with pytest.raises(KeyError, match="release"):
        filled_in("a{b='$release'}", {})
