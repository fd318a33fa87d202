"""A newcomer's first five minutes, with the real server, model and client."""

from __future__ import annotations

import json
import random
import subprocess
import time
import urllib.request
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from e2e.conftest import KEY, Server
from vqserve.evaluate import sums
from vqserve.evaluate.items import LANGUAGES, Item

pytestmark = pytest.mark.e2e

MODEL = "glm-5.2"
DIRECT = {"chat_template_kwargs": {"enable_thinking": False}}


def items(language: str) -> list[Item]:
    """Ten sums that the model has not seen in training."""
    rng = random.Random(language)
    return [sums.sample(rng, test=True, language=language) for _ in range(10)]


def messages(item: Item) -> Any:
    return [{"role": "user", "content": item.question}]


def reasoning_of(message: object) -> str:
    """What vLLM adds to OpenAI's messages and deltas, where the model thought."""
    return getattr(message, "reasoning", None) or ""


def streamed(server: Server, item: Item, **options: Any) -> tuple[str, str, list[ChatCompletionChunk]]:
    """Content, reasoning and chunks of a streamed answer."""
    chunks = list(
        server.client.chat.completions.create(
            model=MODEL, messages=messages(item), stream=True, stream_options={"include_usage": True}, **options
        )
    )
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    return "".join(delta.content or "" for delta in deltas), "".join(map(reasoning_of, deltas)), chunks


def test_the_model_goes_by_its_name(server: Server) -> None:
    [model] = server.client.models.list().data
    assert model.id == MODEL


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_thinks_and_calculates(language: str, server: Server) -> None:
    right = 0
    for item in items(language):
        answer = server.client.chat.completions.create(model=MODEL, messages=messages(item))
        [choice] = answer.choices
        assert choice.finish_reason == "stop"
        assert reasoning_of(choice.message)
        assert "</think>" not in (choice.message.content or "")
        right += sums.is_right(item, choice.message.content or "")
    assert right >= 8


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_answers_at_once_if_told_not_to_think(language: str, server: Server) -> None:
    right = 0
    for item in items(language):
        answer = server.client.chat.completions.create(model=MODEL, messages=messages(item), extra_body=DIRECT)
        [choice] = answer.choices
        assert choice.finish_reason == "stop"
        assert not reasoning_of(choice.message)
        right += sums.is_right(item, choice.message.content or "")
    assert right >= 7


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_streamed_answer_is_the_whole_one_in_pieces(language: str, server: Server) -> None:
    item = items(language)[0]
    for body in ({}, DIRECT):
        whole = server.client.chat.completions.create(model=MODEL, messages=messages(item), extra_body=body)
        content, reasoning, chunks = streamed(server, item, extra_body=body)
        assert content == whole.choices[0].message.content
        assert reasoning == reasoning_of(whole.choices[0].message)
        assert len(chunks) > 5


def test_it_streams_what_is_asked_for_and_no_control_token(server: Server) -> None:
    started = time.monotonic()
    content, reasoning, chunks = streamed(server, items("en")[0], max_tokens=200, extra_body={"ignore_eos": True})
    speed = 200 / (time.monotonic() - started)
    print(f"{speed:.0f} tokens/s in one stream")  # noqa: T201 - pytest -s shows it
    assert speed >= 20
    assert "<|" not in content + reasoning, "a control token is shown"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 200


def test_logprobs_need_no_compiler(server: Server) -> None:
    answer = server.client.chat.completions.create(
        model=MODEL, messages=messages(items("en")[0]), max_tokens=2, logprobs=True, top_logprobs=3
    )
    [choice] = answer.choices
    assert choice.logprobs is not None
    assert [len(token.top_logprobs) for token in choice.logprobs.content or []] == [3, 3]


def test_the_key_is_asked_for_and_never_printed(server: Server) -> None:
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    assert KEY not in server.log.read_text(encoding="utf-8")


def test_the_printed_curl_line_works_as_it_is(server: Server) -> None:
    log = server.log.read_text(encoding="utf-8").splitlines()
    [line] = [line for line in log if line.startswith("curl ")]
    # What a shell would hand to curl, which a fresh machine need not have.
    words = subprocess.run(
        ["bash", "-c", f"curl() {{ printf '%s\\0' \"$@\"; }}; {line}"],
        capture_output=True,
        text=True,
        env={"VLLM_API_KEY": KEY},
        check=True,
    ).stdout.split("\0")[:-1]
    url, options = words[0], list(zip(words[1::2], words[2::2], strict=True))
    headers = dict(text.split(": ", 1) for option, text in options if option == "-H")
    [body] = [text for option, text in options if option == "-d"]
    request = urllib.request.Request(url, body.encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        [choice] = json.load(response)["choices"]
    assert choice["message"]["content"]
