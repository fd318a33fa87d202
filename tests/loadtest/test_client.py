"""Each fault of a server lands in its class, and of every answer the right things are measured."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress

import pytest

from loadtest.answer import Answer, Broken
from loadtest.client import Client, Options, Place
from loadtest.ports import free_port
from loadtest.prompts import Message, Prompt
from loadtest.records import Outcome, Record

PROMPT = Prompt("sum", "en", (Message("user", "6 × 7 = ?"),), "42")


def ask(host: str, model: str, options: Options | None = None) -> Record:
    return Client(host, model).ask(PROMPT, options or Options(timeout_s=20), Place("rate 1"))


@pytest.mark.parametrize(
    ("model", "outcome", "status"),
    [
        ("plain", Outcome.OK, 200),
        ("reasoned", Outcome.OK, 200),
        ("split", Outcome.OK, 200),
        ("over-cap", Outcome.OVER_CAP, 400),
        ("invalid", Outcome.INVALID, 400),
        ("missing", Outcome.INVALID, 404),
        ("unauthorized", Outcome.UNAUTHORIZED, 401),
        ("shed-429", Outcome.SHED, 429),
        ("shed-503", Outcome.SHED, 503),
        ("broken", Outcome.SERVER_ERROR, 500),
        ("gateway", Outcome.SERVER_ERROR, 502),
        ("failing", Outcome.SERVER_ERROR, 200),
        ("cut", Outcome.CUT, 200),
        ("no-done", Outcome.NO_DONE, 200),
        ("garbage", Outcome.GARBAGE, 200),
        ("parts", Outcome.GARBAGE, 200),
        ("deep", Outcome.GARBAGE, 200),
        ("unpaired", Outcome.SERVER_ERROR, 200),
        ("empty", Outcome.EMPTY, 200),
        ("reasoning-only", Outcome.LENGTH, 200),
        ("long", Outcome.LENGTH, 200),
        ("repetition", Outcome.REPETITION, 200),
        ("detected", Outcome.REPETITION, 200),
    ],
)
def test_every_end_of_a_request_lands_in_its_class(server: str, model: str, outcome: Outcome, status: int) -> None:
    record = ask(server, model)
    assert (record.outcome, record.status) == (outcome, status), record.detail
    assert bool(record.detail) == (outcome != Outcome.OK)
    record.detail.encode()  # what is written down


def test_a_server_that_is_not_there_is_told_from_one_that_fails() -> None:
    port = free_port()
    record = ask(f"http://127.0.0.1:{port}", "plain")
    assert (record.outcome, record.status) == (Outcome.CONNECT, None)


def test_an_answer_that_does_not_end_in_time_is_given_up_and_keeps_what_came(server: str) -> None:
    record = ask(server, "slow", Options(timeout_s=0.3))
    assert record.outcome == Outcome.TIMEOUT
    assert record.ttft_s is not None
    assert 0.3 <= record.e2e_s < 5


def test_a_shed_request_keeps_the_servers_wish(server: str) -> None:
    assert [ask(server, model).retry_after_s for model in ("shed-429", "shed-503", "broken")] == [7, 2.5, None]


def test_the_first_token_may_be_reasoning_and_the_first_content_comes_apart(server: str) -> None:
    record = ask(server, "reasoned")
    assert record.ttft_s is not None
    assert record.first_content_s is not None
    assert record.first_content_s - record.ttft_s > 0.04
    assert (record.reasoning_chars, record.content_chars, record.correct) == (3, 2, True)


def test_an_answer_of_reasoning_alone_has_a_first_token_and_no_content(server: str) -> None:
    record = ask(server, "reasoning-only")
    assert record.ttft_s is not None
    assert record.first_content_s is None


def test_tokens_are_counted_from_usage_and_not_from_chunks(server: str) -> None:
    record = ask(server, "reasoned")
    assert (record.prompt_tokens, record.completion_tokens, record.gap_tokens) == (7, 3, (2,))
    assert record.tpot_s == pytest.approx(record.gaps_s[0] / 2)


def test_characters_split_over_chunks_arrive_whole(server: str) -> None:
    record = ask(server, "split")
    assert (record.content_chars, record.correct) == (8, True)


def test_events_have_the_times_they_came_at_whatever_ends_their_lines(server: str) -> None:
    record = ask(server, "crlf")
    assert record.correct
    assert len(record.gaps_s) == 1
    assert record.gaps_s[0] == pytest.approx(0.2, abs=0.1)


def test_reaching_max_tokens_is_right_where_it_was_asked_for(server: str) -> None:
    assert ask(server, "long", Options(ignore_eos=True)).outcome == Outcome.OK


@pytest.mark.parametrize(
    "event",
    [
        '{"choices": [{"delta": {"content": {"text": "42"}}}]}',
        '{"choices": [{"delta": {"reasoning": 42}}]}',
        '{"choices": [{"text": ["42"]}]}',
        '{"choices": [{"finish_reason": ["stop"]}]}',
        '{"choices": ["42"]}',
        '{"choices": {"a": 1}}',
        '{"choices": [], "usage": {"prompt_tokens": Infinity}}',
        '{"choices": [], "usage": {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": "all"}}}',
        '{"choices": [], "usage": [1]}',
        '{"a":' * 100_000,
        "[]",
        "null",
    ],
    ids=lambda event: event[:60],
)
def test_an_event_of_another_form_is_garbage(event: str) -> None:
    with pytest.raises(Broken) as broken:
        Answer().add(event, 0.0)
    assert broken.value.outcome == Outcome.GARBAGE


@pytest.mark.parametrize(("path", "models"), [("list", {}), ("data", {}), ("words", {}), ("cap", {"glm": None})])
def test_a_list_of_models_of_another_form_lists_what_can_be_read(
    server: str, path: str, models: dict[str, int | None]
) -> None:
    client = Client(f"{server}/{path}", "")
    assert client.models() == models
    assert client.version() is None


def test_an_ingress_is_asked_by_tls_too_for_the_name_that_the_request_names() -> None:
    asked: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda _, name, __: asked.append(name)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            connection, _ = listening.accept()
            # It has no certificate: the name comes before one is looked for.
            with connection, suppress(OSError), context.wrap_socket(connection, server_side=True):
                pass

        thread = threading.Thread(target=greet)
        thread.start()
        address = f"https://127.0.0.1:{listening.getsockname()[1]}"
        record = Client(address, "plain", host_header="glm.example.com:8443").ask(PROMPT, Options(timeout_s=20))
        thread.join()
    assert record.outcome == Outcome.CONNECT
    assert asked == ["glm.example.com"]


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="such as http://"):
        Client("127.0.0.1:8001", "plain")
