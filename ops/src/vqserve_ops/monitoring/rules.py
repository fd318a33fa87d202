"""Recording rules and alerts as Prometheus takes them, and how they are written down.

What differs from release to release stands in them as `${name}`: the chart fills it in when it is rendered. Helm does
not read the file as a template, so that Prometheus's own `{{ $labels.pod }}` stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from vqserve_ops.monitoring.promql import containers_of, pods_of, scraped

SCOPE = scraped("${namespace}", "${service}")
PODS = pods_of("${namespace}", "${service}")
ENGINE = containers_of(PODS)
SUM_BY_RELEASE = "sum by (namespace, service)"
PLACEHOLDERS = (
    "namespace",
    "service",
    "claims",
    "runbooks",
    "ttftSeconds",
    "interTokenSeconds",
    "objective",
    "stallSeconds",
    "waitingRequests",
    "loadSeconds",
)
"""All that the chart fills in."""

_WIDTH = 118


@dataclass(frozen=True)
class Recording:
    """A query whose result is kept under a name.

    Attributes:
        name: As `level:metric:operation`.
        expr: PromQL.
    """

    name: str
    expr: str

    def rendered(self) -> dict[str, Any]:
        """The rule as Prometheus takes it."""
        return {"record": self.name, "expr": self.expr}


@dataclass(frozen=True)
class Alert:
    """Something that a person has to know.

    Attributes:
        name: Also that of its runbook.
        expr: PromQL; every series it yields is one alert.
        after: How long it has to hold, as a Prometheus duration: what is over by itself wakes nobody.
        severity: `critical` if users get no answers or soon will not; `warning` if it can wait for the day.
        summary: One line, without the value.
        description: Sentences with the value, for who has not seen the query.
    """

    name: str
    expr: str
    after: str
    severity: Literal["critical", "warning"]
    summary: str
    description: str

    def rendered(self) -> dict[str, Any]:
        """The rule as Prometheus takes it."""
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.after,
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": "${runbooks}/" + self.name + ".md",
            },
        }


@dataclass(frozen=True)
class Group:
    """Rules that are evaluated one after the other, so that later ones see what earlier ones recorded."""

    name: str
    rules: Sequence[Recording | Alert]

    def rendered(self) -> dict[str, Any]:
        """The group as Prometheus takes it."""
        return {"name": self.name, "rules": [rule.rendered() for rule in self.rules]}


def file_of(groups: Sequence[Group]) -> str:
    """A rule file of Prometheus, which is also the body of a PrometheusRule."""

    class Readable(yaml.SafeDumper):
        """Lists indented as yamllint wants them, and queries in lines as they were written."""

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            super().increase_indent(flow, False)

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Readable.add_representer(str, text)
    body = yaml.dump({"groups": [group.rendered() for group in groups]}, Dumper=Readable, sort_keys=False, width=_WIDTH)
    written = "# Written by vqserve_ops/monitoring/generate.py (`make chart`). `helm template` prints it filled in."
    return f"{written}\n---\n{body}"
