"""The demo's chat template under vLLM's own rendering and parsing, without an engine; with one see e2e."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, resolve_default_chat_template_kwargs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.renderers.registry import renderer_from_config
from vllm.utils.argparse_utils import FlexibleArgumentParser

USER = {"role": "user", "content": "1 + 1 = ?"}
THOUGHT, ANSWER = "1+1=2", "The answer is 2."

switches: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        name: st.sampled_from([None, True, False, 0, 1, "", "no", "auto", [], {}])
        for name in ("enable_thinking", "thinking")
    },
)
"""`chat_template_kwargs`: each switch left out, or with a value of any truth."""
efforts = st.sampled_from([None, "none", "minimal", "low", "medium", "high"])

Chat = Callable[..., OnlineRenderer]


@pytest.fixture(scope="module")
def chat(demo_parent: Path) -> Chat:
    """Makes what stands before the engine in a server of the demo's parent."""
    config = EngineArgs(model=str(demo_parent), max_model_len=1024).create_engine_config()
    renderer = renderer_from_config(config)
    options = make_arg_parser(FlexibleArgumentParser()).parse_args([])

    def make(defaults: dict[str, Any] | None = None) -> OnlineRenderer:
        options.default_chat_template_kwargs = defaults
        return OnlineRenderer(
            config.model_config,
            renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
            enable_auto_tools=True,
            tool_parser="glm47",
            reasoning_parser="glm45",
            default_chat_template_kwargs=resolve_default_chat_template_kwargs(options),
        )

    return make


def rendered(chat: OnlineRenderer, request: ChatCompletionRequest) -> list[int]:
    """The prompt's ids."""
    result = asyncio.run(chat.render_chat(request))
    assert isinstance(result, tuple), result
    [prompt] = result[1]
    ids: list[int] = prompt["prompt_token_ids"]  # type: ignore[typeddict-item]
    return ids


def request_of(*messages: dict[str, Any], **fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": messages, **fields})


def ids_of(chat: Chat, *messages: dict[str, Any]) -> list[int]:
    return rendered(chat(), request_of(*messages))


def parsed(chat: OnlineRenderer, request: ChatCompletionRequest, text: str) -> tuple[str, str]:
    """Reasoning and content of an answer that comes whole."""
    reasoning, content, _ = parser_of(chat, request).parse(
        text, request, enable_auto_tools=True, model_output_token_ids=encoded(chat, text)
    )
    return reasoning or "", content or ""


def parsed_in_pieces(
    chat: OnlineRenderer, request: ChatCompletionRequest, prompt: list[int], text: str
) -> tuple[str, str]:
    """Reasoning and content of an answer that is streamed, a token at a time."""
    tokenizer, parser = chat.renderer.get_tokenizer(), parser_of(chat, request)
    ids = encoded(chat, text)
    deltas = [
        parser.parse_delta(tokenizer.decode([token]), [token], request, prompt, finished=place == len(ids))
        for place, token in enumerate(ids, 1)
    ]
    said = [delta for delta in deltas if delta]
    return "".join(delta.reasoning or "" for delta in said), "".join(delta.content or "" for delta in said)


def parser_of(chat: OnlineRenderer, request: ChatCompletionRequest) -> Any:
    """A parser as the server makes one for each request."""
    assert chat.parser is not None
    kwargs = chat.effective_chat_template_kwargs(request)
    tokenizer = chat.renderer.get_tokenizer()
    return chat.parser(tokenizer, None, chat_template_kwargs=kwargs, model_config=chat.model_config)


def encoded(chat: OnlineRenderer, text: str) -> list[int]:
    return list(chat.renderer.get_tokenizer().encode(text, add_special_tokens=False))


@given(switches, efforts, st.none() | switches)
@example({"enable_thinking": None}, None, None)
@example({"thinking": False}, None, None)
@example({"enable_thinking": False, "thinking": True}, None, None)
@example({"thinking": True}, "none", None)
def test_an_answer_is_parsed_as_thinking_exactly_if_its_prompt_ends_in_an_open_think_mark(
    chat: Chat, given: dict[str, Any], effort: str | None, defaults: dict[str, Any] | None
) -> None:
    served = chat(defaults)
    request = request_of(USER, chat_template_kwargs=given, reasoning_effort=effort)
    prompt = rendered(served, request)
    [opened], [closed] = encoded(served, "<think>"), encoded(served, "</think>")
    assert prompt[-1] in (opened, closed)
    thinks = prompt[-1] == opened
    text, expected = (f"{THOUGHT}</think>{ANSWER}", (THOUGHT, ANSWER)) if thinks else (ANSWER, ("", ANSWER))
    assert parsed(served, request, text) == expected
    assert parsed_in_pieces(served, request, prompt, text) == expected


@pytest.mark.parametrize(
    ("given", "effort", "thinks"),
    [
        ({}, None, True),
        ({"enable_thinking": None}, None, True),
        ({"enable_thinking": False}, None, False),
        ({"thinking": False}, None, False),
        ({"enable_thinking": False, "thinking": True}, None, True),
        ({"enable_thinking": True, "thinking": False}, None, True),
        ({}, "none", False),
        ({}, "low", True),
        ({"enable_thinking": True}, "none", True),
        ({"thinking": True}, "none", True),
    ],
)
def test_the_switches_mean_what_vllm_takes_them_for(
    chat: Chat, given: dict[str, Any], effort: str | None, thinks: bool
) -> None:
    served = chat()
    prompt = rendered(served, request_of(USER, chat_template_kwargs=given, reasoning_effort=effort))
    assert prompt[-1:] == encoded(served, "<think>" if thinks else "</think>")


def parts(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"content": [{"type": "text", "text": message["content"]}]}


@given(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=20)), min_size=1, max_size=4)
)
def test_a_message_as_a_part_is_the_message_as_a_string(chat: Chat, said: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": text} for role, text in said]
    assert ids_of(chat, *map(parts, messages)) == ids_of(chat, *messages)


def test_several_parts_are_one_text(chat: Chat) -> None:
    several = {"role": "user", "content": [{"type": "text", "text": text} for text in ("1 + ", "1 = ?")]}
    assert ids_of(chat, several) == ids_of(chat, USER)


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_thinking_that_is_handed_back_is_accepted_and_dropped(chat: Chat, field: str) -> None:
    answer = {"role": "assistant", "content": ANSWER}
    with_thinking = ids_of(chat, USER, answer | {field: THOUGHT}, USER)
    assert with_thinking == ids_of(chat, USER, answer, USER)
    inside = {"role": "assistant", "content": f"{THOUGHT}</think>{ANSWER}"}
    assert with_thinking == ids_of(chat, USER, inside, USER)


def test_an_answer_cut_off_while_thinking_can_be_handed_back(chat: Chat) -> None:
    cut = {"role": "assistant", "content": None, "reasoning": THOUGHT}
    assert ids_of(chat, USER, cut, USER) == ids_of(chat, USER, {"role": "assistant", "content": ""}, USER)
