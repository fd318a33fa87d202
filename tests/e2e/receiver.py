"""A receiver of OpenTelemetry's traces over gRPC, which keeps what it gets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

Value = str | int | float | bool


@dataclass(frozen=True)
class Span:
    """A span that was received.

    Attributes:
        name: What happened.
        service: `service.name` of the process it happened in.
        trace: Id of its trace, in hexadecimal.
        seconds: How long it took.
        attributes: Of the span.
    """

    name: str
    service: str
    trace: str
    seconds: float
    attributes: dict[str, Value]


@dataclass
class Receiver(TraceServiceServicer):
    """Collects spans.

    Attributes:
        url: What `--otlp-traces-endpoint` takes.
        spans: In the order they came.
    """

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    _more: threading.Condition = field(default_factory=threading.Condition)

    def Export(self, request: ExportTraceServiceRequest, context: grpc.ServicerContext) -> ExportTraceServiceResponse:
        """Takes what a process sends."""
        with self._more:
            for resource in request.resource_spans:
                service = {each.key: _value(each.value) for each in resource.resource.attributes}["service.name"]
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    attributes = {each.key: _value(each.value) for each in span.attributes}
                    seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
                    self.spans.append(Span(span.name, str(service), span.trace_id.hex(), seconds, attributes))
            self._more.notify_all()
        return ExportTraceServiceResponse()

    def wait_for(self, wanted: Callable[[Span], bool], seconds: float = 60) -> list[Span]:
        """The spans that are wanted, as soon as there is one."""
        with self._more:
            assert self._more.wait_for(lambda: any(map(wanted, self.spans)), seconds), {s.name for s in self.spans}
            return list(filter(wanted, self.spans))


@contextmanager
def receiver() -> Iterator[Receiver]:
    """Starts a receiver on a free port of this machine."""
    found, server = Receiver(), grpc.server(ThreadPoolExecutor(4))
    add_TraceServiceServicer_to_server(found, server)  # type: ignore[no-untyped-call]
    found.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield found
    finally:
        server.stop(None).wait()


def _value(value: AnyValue) -> Value:
    return getattr(value, value.WhichOneof("value") or "string_value")  # type: ignore[no-any-return]
