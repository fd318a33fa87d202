"""The spans of a start and of a request, as a collector gets them."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.conftest import Server
from e2e.receiver import Receiver
from vqserve.format.files import check_checkpoint

pytestmark = pytest.mark.e2e

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_a_request_is_a_span_of_the_callers_trace(server: Server, spans: Receiver) -> None:
    answer = server.client.chat.completions.create(
        model="glm-5.2",
        messages=[{"role": "user", "content": "12 + 34 = ?"}],
        extra_headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"},
    )
    [span] = spans.wait_for(lambda span: span.trace == TRACE)
    assert answer.usage
    assert (span.name, span.service) == ("llm_request", "demo")
    assert span.attributes["gen_ai.usage.prompt_tokens"] == answer.usage.prompt_tokens
    assert span.attributes["gen_ai.usage.completion_tokens"] == answer.usage.completion_tokens
    assert 0 < float(span.attributes["gen_ai.latency.time_to_first_token"]) < span.seconds


def test_a_start_tells_what_it_spent_on_checking_and_preparing(
    server: Server, spans: Receiver, demo_model: Path
) -> None:
    checkpoint = check_checkpoint(demo_model, digests=False)
    prepared = spans.wait_for(lambda span: span.name == "vqserve prepare experts")
    assert {span.attributes["vqserve.layer"] for span in prepared} == {each.name for each in checkpoint.quant.modules}
    assert all(int(span.attributes["vqserve.bytes"]) > 0 for span in prepared)
    verified = spans.wait_for(lambda span: span.name == "vqserve verify checkpoint")
    assert {span.attributes["vqserve.folder"] for span in verified} == {str(demo_model)}
    loading = spans.wait_for(lambda span: span.name == "Load weights")
    assert {span.service for span in (*prepared, *verified, *loading)} == {"demo"}
