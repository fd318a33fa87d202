"""The safety nets of a served demo: a loop is left, sums are as they were, thinking is closed and answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from e2e.conftest import BUDGET, KEY, Server, Watched, scraped
from e2e.test_chat import MODEL, post
from vqserve.reference import repetition
from vqserve.vllm_plugin.counters import NAMES, STEERED, THINKING_CLOSED

pytestmark = pytest.mark.e2e

CLOSE = 11
"""The demo's token `</think>`."""
UNLIMITED = 1_000_000
LOOP = "1 1 1 1 1"


@pytest.fixture
def caught(watched: Watched) -> Server:
    return watched.server


def counted(server: Server) -> list[float]:
    """Closed thinkings and steered tokens, as Prometheus is told."""
    found = scraped(server)
    return [found[f"{name}_total"][""] for name in NAMES]


def chat(server: Server, question: str, **options: Any) -> tuple[str, str, list[int]]:
    """Reasoning, content and tokens of an answer."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0.0} | options
    status, answer = post(server, "/v1/chat/completions", {**body, "return_token_ids": True}, KEY)
    assert status == 200, answer
    [choice] = answer["choices"]
    return choice["message"]["reasoning"] or "", choice["message"]["content"] or "", choice["token_ids"]


def repeated(server: Server, **options: Any) -> int:
    """How long a repetition the model falls into, in tokens, when it may not end."""
    body = {"model": MODEL, "prompt": LOOP, "max_tokens": 300, "temperature": 0.0, "ignore_eos": True} | options
    status, answer = post(server, "/v1/completions", {**body, "return_token_ids": True}, KEY)
    assert status == 200, answer
    out = answer["choices"][0]["token_ids"]
    ends = (repetition.penalties(out[:n], strength=1, min_length=1, window=512, longest=512) for n in range(200, 301))
    return int(max(max(found.values(), default=0.0) for found in ends))


def test_a_model_that_loops_is_brought_out_of_it(caught: Server) -> None:
    before = counted(caught)[STEERED]
    assert repeated(caught, vllm_xargs={"anti_repetition": 0.0}) > 250
    assert counted(caught)[STEERED] == before
    assert repeated(caught) < 100
    assert counted(caught)[STEERED] > before


@pytest.mark.parametrize("sum_", ["111 + 111", "11 * 11", "1111 * 11", "99999 + 11111", "100000 - 11111"])
def test_sums_with_repeated_digits_are_unharmed(sum_: str, caught: Server) -> None:
    question, thinking = f"What is {sum_}?", {"thinking_token_budget": UNLIMITED}
    plain = chat(caught, question, **thinking, vllm_xargs={"anti_repetition": 0.0})
    assert chat(caught, question, **thinking) == plain


def test_thinking_is_closed_at_the_server_s_budget_and_an_answer_follows(caught: Server) -> None:
    before = counted(caught)[THINKING_CLOSED]
    reasoning, content, tokens = chat(caught, "What is 36 * 47?")
    assert reasoning
    assert tokens.index(CLOSE) == BUDGET
    assert "The answer is" in content
    assert "</think>" not in reasoning + content
    assert counted(caught)[THINKING_CLOSED] == before + 1


def test_a_request_may_have_another_budget(caught: Server) -> None:
    before = counted(caught)[THINKING_CLOSED]
    reasoning, content, _ = chat(caught, "What is 36 * 47?", thinking_token_budget=UNLIMITED)
    assert reasoning.endswith("1692")
    assert content.endswith("The answer is 1692.")
    assert counted(caught)[THINKING_CLOSED] == before
    assert chat(caught, "What is 36 * 47?", thinking_token_budget=10)[2].index(CLOSE) == 10


@pytest.mark.parametrize("wrong", [-1, "much", "1,0", ["1"]])
def test_a_wrong_argument_is_answered_with_400_and_what_to_do(wrong: object, caught: Server) -> None:
    body = {"model": MODEL, "prompt": LOOP, "vllm_xargs": {"anti_repetition": wrong}}
    status, answer = post(caught, "/v1/completions", body, KEY)
    assert status == 400
    assert "vllm_xargs.anti_repetition = " in answer["error"]["message"]
    assert "0 turns it off" in answer["error"]["message"]


def responses(server: Server, question: str) -> tuple[str, str]:
    """Reasoning and content as OpenAI's newer route gives them."""
    status, answer = post(server, "/v1/responses", {"model": MODEL, "input": question, "temperature": 0.0}, KEY)
    assert status == 200, answer
    reasoning, message = (item["content"][0]["text"] for item in answer["output"])
    return reasoning, message


def messages(server: Server, question: str) -> tuple[str, str]:
    """Reasoning and content as Anthropic's route gives them."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 400, "temperature": 0.0}
    status, answer = post(server, "/v1/messages", {"model": MODEL, **body}, KEY)
    assert status == 200, answer
    thinking, text = answer["content"]
    return thinking["thinking"], text["text"]


@pytest.mark.parametrize("ask", [responses, messages])
def test_other_routes_have_the_server_s_nets_too(ask: Callable[[Server, str], tuple[str, str]], caught: Server) -> None:
    before = counted(caught)[THINKING_CLOSED]
    assert ask(caught, "What is 36 * 47?") == chat(caught, "What is 36 * 47?")[:2]
    assert counted(caught)[THINKING_CLOSED] == before + 2
