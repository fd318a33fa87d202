"""A cluster that holds objects in memory and answers as it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ops.objects import Made
from vqserve_ops.cluster import ForbiddenError


@dataclass
class FakeCluster:
    """Stands for `vqserve_ops.cluster.Cluster`."""

    objects: dict[str, list[Made]] = field(default_factory=dict)
    logs: dict[tuple[str, str, bool], str] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=list)
    executed: list[list[str]] = field(default_factory=list)
    answer: tuple[int, str] = (0, "draining: asked for")
    forbidden: set[str] = field(default_factory=set)
    deleted: list[tuple[str, str]] = field(default_factory=list)
    on_create: Any = None
    namespace: str = "llm"

    def listed(self, kind: str, labels: Mapping[str, str] | None = None) -> list[Made]:
        if kind in self.forbidden:
            raise ForbiddenError(f"may not list {kind}; have a Role bound")
        wanted = (labels or {}).items()
        found = self.objects.get(kind, [])
        return [thing for thing in found if wanted <= (thing["metadata"].get("labels") or {}).items()]

    def get(self, kind: str, name: str) -> Made | None:
        if kind in self.forbidden:
            raise ForbiddenError(f"may not read {kind}; have a Role bound")
        return next((thing for thing in self.objects.get(kind, []) if thing["metadata"]["name"] == name), None)

    def create(self, kind: str, body: Made) -> Made:
        self.objects.setdefault(kind, []).append(body)
        if self.on_create:
            self.on_create(self, body)
        return body

    def delete(self, kind: str, name: str) -> None:
        self.deleted.append((kind, name))

    def nodes(self) -> list[Made]:
        return self.objects.get("Node", [])

    def version(self) -> str:
        return "v1.34.4"

    def log(self, pod: str, container: str, *, previous: bool = False, lines: int = 0) -> str:
        return self.logs.get((pod, container, previous), "")

    def execute(self, pod: str, container: str, command: Sequence[str], seconds: float) -> tuple[int, str]:
        self.executed.append([pod, container, *command])
        if command[-1].endswith("/metrics"):
            return 0, self.metrics.pop(0) if len(self.metrics) > 1 else self.metrics[0]
        return self.answer
