"""Spans of our own in vLLM's traces: what a start spends on checking and preparing a checkpoint.

Where vLLM was given no `--otlp-traces-endpoint`, OpenTelemetry makes spans that do nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace

VERIFY = "vqserve verify checkpoint"
EXPERTS = "vqserve prepare experts"

Value = str | int | float | bool

_earlier: list[tuple[str, dict[str, Value], int, int]] = []
"""Name, attributes, begin and end of spans that ended before vLLM had set OpenTelemetry up in this process."""


@contextmanager
def span(name: str, **attributes: Value) -> Iterator[None]:
    """Makes a span of what happens inside, beside vLLM's own; an exception goes on, recorded if vLLM traces by then.

    Args:
        name: What happens.
        attributes: Of the span, each under `vqserve.`.
    """
    of_ours = {f"vqserve.{key}": value for key, value in attributes.items()}
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        begin = time.time_ns()
        yield
        _earlier.append((name, of_ours, begin, time.time_ns()))
    else:
        with _tracer().start_as_current_span(name, attributes=of_ours):
            yield


def send_earlier() -> None:
    """Makes the spans that came too early, in the API server, once vLLM has set OpenTelemetry up or will not."""
    for name, attributes, begin, end in _earlier:
        _tracer().start_span(name, attributes=attributes, start_time=begin).end(end)
    _earlier.clear()


def _tracer() -> trace.Tracer:
    return trace.get_tracer("vqserve")
