"""What clients may send to the demo's parent, as it is served: switches of thinking, parts, several answers, no key."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessageParam

from e2e.conftest import KEY, Server, serving, wait_for

pytestmark = pytest.mark.e2e

MODEL = "glm-5.2"
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is 36 * 47?"}]


@pytest.fixture(scope="module")
def parent(demo_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The parent's server."""
    with serving(demo_parent, tmp_path_factory.mktemp("parent"), "--bf16") as started:
        wait_for(started, "/ready", 200)
        yield started


def whole(server: Server, **options: Any) -> tuple[str, str]:
    """Reasoning and content of an answer."""
    answer = server.client.chat.completions.create(model=MODEL, messages=QUESTION, **options)
    [choice] = answer.choices
    return getattr(choice.message, "reasoning", None) or "", choice.message.content or ""


def streamed(server: Server, **options: Any) -> tuple[str, str]:
    """Reasoning and content of an answer that comes in pieces."""
    chunks = server.client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, **options)
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    reasoning = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
    return reasoning, "".join(delta.content or "" for delta in deltas)


@pytest.mark.parametrize(
    ("switches", "effort", "thinks"),
    [
        ({"enable_thinking": None}, None, True),
        ({"thinking": False}, None, False),
        ({"enable_thinking": False, "thinking": True}, None, True),
        ({"thinking": True}, "none", True),
        ({"enable_thinking": False, "thinking": "auto"}, None, False),
        ({}, "none", False),
    ],
)
def test_thinking_comes_as_reasoning_and_the_answer_as_content(
    switches: dict[str, Any], effort: str | None, thinks: bool, parent: Server
) -> None:
    options = {"temperature": 0.0, "extra_body": {"chat_template_kwargs": switches, "reasoning_effort": effort}}
    reasoning, content = whole(parent, **options)
    assert bool(reasoning) == thinks
    assert content.endswith("The answer is 1692.")
    assert "</think>" not in reasoning + content
    assert streamed(parent, **options) == (reasoning, content)


def test_by_default_an_answer_is_the_likeliest_one_and_several_may_be_asked_for(parent: Server) -> None:
    greedy = whole(parent, temperature=0.0)
    assert whole(parent) == whole(parent) == greedy
    several = parent.client.chat.completions.create(model=MODEL, messages=QUESTION, n=2)
    assert [choice.message.content for choice in several.choices] == [greedy[1]] * 2


def test_the_shipped_defaults_draw_no_warning(parent: Server) -> None:
    assert "generation flags" not in parent.log.read_text(encoding="utf-8")


def test_a_stop_string_in_the_thinking_ends_the_answer_there(parent: Server) -> None:
    reasoning, content = whole(parent, stop=["→"])
    assert (reasoning, content) == ("36×7: 6×7=42 3×7+4=25", "")


def post(server: Server, path: str, body: Any, key: str | None = None) -> tuple[int, Any]:
    """Status and body of a POST."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{server.url}{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.parametrize("path", ["/invocations", "/tokenize"])
def test_a_route_outside_v1_wants_the_key_too(path: str, parent: Server) -> None:
    body = {"messages": QUESTION}
    status, answer = post(parent, path, body)
    assert (status, answer["error"]["code"]) == (401, 401)
    assert post(parent, path, body, "wrong")[0] == 401
    assert post(parent, path, body, KEY)[0] == 200


def test_a_message_in_parts_is_the_same_prompt(parent: Server) -> None:
    def prompt(*contents: Any) -> Any:
        roles = ("system", "user", "assistant", "user")
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        return post(parent, "/tokenize", {"messages": messages}, KEY)[1]["tokens"]

    texts = ("Be brief.", "1 + 1 = ?", "The answer is 2.", "2 + 2 = ?")
    assert prompt(*([{"type": "text", "text": text}] for text in texts)) == prompt(*texts)
