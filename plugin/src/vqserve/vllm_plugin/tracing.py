"""Spans of our own in vLLM's traces: what a start spends on checking and preparing a checkpoint.

Where vLLM was given no `--otlp-traces-endpoint`, OpenTelemetry makes spans that do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace

VERIFY = "vqserve verify checkpoint"
EXPERTS = "vqserve prepare experts"

Value = str | int | float | bool


@contextmanager
def span(name: str, **attributes: Value) -> Iterator[None]:
    """Makes a span of what happens inside, beside vLLM's own; an exception is recorded and goes on.

    Args:
        name: What happens.
        attributes: Of the span, each under `vqserve.`.
    """
    of_ours = {f"vqserve.{key}": value for key, value in attributes.items()}
    with trace.get_tracer("vqserve").start_as_current_span(name, attributes=of_ours):
        yield
