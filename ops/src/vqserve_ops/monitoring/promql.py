"""What PromQL expressions select and name, and how to ask one without Grafana."""

from __future__ import annotations

import re
from collections.abc import Mapping

_STRING = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|`[^`]*`')
_SELECTOR = re.compile(r"\{[^{}]*\}")
_RANGE = re.compile(r"\[[^\[\]]*\]")
_LABELS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w:])\d[\w.]*")
_NAME = re.compile(r"(?<![\w:$.])[A-Za-z_:][\w:]*(?!\s*\(|[\w:])")
_WORDS = {"and", "or", "unless", "bool", "offset", "group_left", "group_right", "inf", "nan", "atan2", "start", "end"}
_VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)\}")


def scraped(namespace: str, service: str) -> str:
    """Matches what the chart's ServiceMonitor scrapes of one release; both may be variables."""
    return f'namespace="{namespace}",service="{service}"'


def pods_of(namespace: str, service: str) -> str:
    """Matches the engine's pods in metrics of others, by name: the Deployment is called as the Service is."""
    return f'namespace="{namespace}",pod=~"{service}-[a-z0-9]+-[a-z0-9]{{5}}"'


def containers_of(pods: str) -> str:
    """Matches the engine's containers of the pods that `pods` matches."""
    return f'{pods},container="engine"'


def exported(pods: str) -> str:
    """Matches the same pods where a Prometheus does not honour the exporter's own labels and renames them."""
    return pods.replace("namespace=", "exported_namespace=").replace("pod=", "exported_pod=")


def metric_names(expr: str) -> set[str]:
    """Metric names in an expression; a name that is matched as `__name__` is not found.

    >>> sorted(metric_names('sum by (le) (rate(a_bucket{le="b"}[5m])) / on (pod) c:d offset 5m'))
    ['a_bucket', 'c:d']
    """
    rest = _STRING.sub("''", expr)
    for pattern in (_SELECTOR, _RANGE, _LABELS, _NUMBER):
        rest = pattern.sub(" ", rest)
    return {name for name in _NAME.findall(rest) if name.lower() not in _WORDS}


def variables(text: str) -> set[str]:
    """Variables of Grafana in an expression or legend, its own (`__rate_interval`) included."""
    return {plain or braced for plain, braced in _VARIABLE.findall(text)}


def filled_in(expr: str, values: Mapping[str, str]) -> str:
    """An expression with its variables replaced, as Grafana does before it asks.

    Raises:
        KeyError: A variable has no value.
    """
    return _VARIABLE.sub(lambda found: values[found[1] or found[2]], expr)
