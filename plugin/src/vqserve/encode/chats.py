"""One line of a calibration file as the prompt that a server would render, and the text a model would have answered.

Chats go through the checkpoint's own chat template, with messages as vLLM hands them to it. The answer is the last
message, if it is the assistant's: what follows the prompt that asks for it, thinking included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from vqserve.format.errors import UsageError

_SCHEMA = (
    'expected {"messages": [{"role": ..., "content": ...}, ...]} and perhaps "tools" and "chat_template_kwargs", '
    '{"prompt": "...", "completion": "..."} or {"text": "..."}'
)
_OPEN, _CLOSE = "<think>", "</think>"
_SWITCHES = {"enable_thinking", "thinking"}


def parse_line(line: str, where: str) -> dict[str, Any]:
    """Reads one line.

    Raises:
        UsageError: It is not JSON, or not what a line may be.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error}); give one JSON object per line") from error
    if not isinstance(record, dict) or not _fits(record):
        raise UsageError(f"{where}: {_SCHEMA}")
    return record


def render(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, str]:
    """The prompt, whose predictions do not count, and the whole text that begins with it.

    Raises:
        UsageError: The template refuses the messages, or renders the answer unlike what it asks the model for.
    """
    if "text" in record:
        return "", record["text"]
    if "prompt" in record:
        return record["prompt"], record["prompt"] + record["completion"]
    return _Chat(record, tokenizer, where).render()


class _Chat:
    """A row of messages.

    Args:
        record: The row.
        tokenizer: With the chat template.
        where: What to call the row in an error.
    """

    def __init__(self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        self._tokenizer, self._where = tokenizer, where
        self._options = {**record.get("chat_template_kwargs", {}), "tools": record.get("tools") or None}
        parts = _takes_parts(tokenizer)
        self._messages = [_as_served(message, parts, where) for message in record["messages"]]

    def render(self) -> tuple[str, str]:
        *before, last = self._messages
        if last["role"] != "assistant":
            return "", self._apply(self._messages, add_generation_prompt=True)
        whole, (reasoning, content) = self._apply(self._messages), _thoughts(last)
        choices: list[dict[str, Any]] = [{}]
        if not reasoning and not _SWITCHES & set(self._options):
            choices.append({"enable_thinking": False})
        prompt = ""
        for choice in choices:
            prompt = self._apply(before, add_generation_prompt=True, **choice)
            if whole.startswith(prompt) and reasoning in whole[len(prompt) :]:
                return prompt, whole
        if reasoning and prompt.endswith(_OPEN):  # the template drops the thinking of an answer that is finished
            return prompt, f"{prompt}{reasoning}{_CLOSE}{content}"
        problem = f"the chat template asks for an answer with {prompt[-20:]!r}, and renders this one otherwise"
        raise UsageError(
            f"{self._where}: {problem}; "
            'say "chat_template_kwargs": {"enable_thinking": ...} as the answer is, or give "prompt" and "completion"'
        )

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **{**self._options, **options}))
        except (TemplateError, ValueError, TypeError, AttributeError) as error:
            problem = f"the chat template refuses these messages ({error}); correct them"
            raise UsageError(f"{self._where}: {problem}") from error


def _as_served(message: Mapping[str, Any], takes_parts: bool, where: str) -> dict[str, Any]:
    """A message as vLLM hands it to the template.

    Null content is empty, parts are joined if the template takes none, arguments of tool calls are objects, reasoning
    stands under both of its names.
    """
    served, content = dict(message), message.get("content")
    if isinstance(content, list) and not takes_parts:
        content = "\n".join(part["text"] for part in content)
    served["content"] = "" if content is None else content
    if reasoning := message.get("reasoning_content") or message.get("reasoning"):
        served["reasoning_content"] = served["reasoning"] = reasoning
    if calls := message.get("tool_calls"):
        served["tool_calls"] = [_with_arguments(call, where) for call in calls]
    return served


def _with_arguments(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except ValueError as error:
            raise UsageError(f"{where}: arguments of a tool call are not JSON ({error}); correct them") from error
    return {**call, "function": function}


def _thoughts(message: Mapping[str, Any]) -> tuple[str, str]:
    """Thinking and answer of a message, whether the thinking is in a field of its own or in front of the content."""
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    before, mark, after = text.rpartition(_CLOSE)
    if mark:
        return before.removeprefix(_OPEN), after
    return str(message.get("reasoning_content", "")), text


def _takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template makes text of a list of parts; others would print it as Python does."""
    probe: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
    try:
        rendered = str(tokenizer.apply_chat_template(probe, tokenize=False))
    except (TemplateError, ValueError, TypeError, AttributeError):
        return False
    return "probe" in rendered and "'type'" not in rendered


def _fits(record: Mapping[str, Any]) -> bool:
    keys = set(record)
    if keys == {"text"} or keys == {"prompt", "completion"}:
        return all(isinstance(value, str) for value in record.values())
    if keys - {"chat_template_kwargs", "tools"} != {"messages"}:
        return False
    messages, tools = record["messages"], record.get("tools")
    return (
        isinstance(record.get("chat_template_kwargs", {}), dict)
        and (tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)))
        and isinstance(messages, list)
        and bool(messages)
        and all(isinstance(message, dict) and _is_message(message) for message in messages)
    )


def _is_message(message: Mapping[str, Any]) -> bool:
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        is_text = all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        )
    else:
        is_text = isinstance(content, str) or (content is None and "content" in message) or bool(calls)
    return (
        isinstance(message.get("role"), str)
        and is_text
        and all(isinstance(message.get(key, ""), str | None) for key in ("reasoning", "reasoning_content"))
        and (calls is None or (isinstance(calls, list) and all(_is_call(call) for call in calls)))
    )


def _is_call(call: object) -> bool:
    return isinstance(call, dict) and isinstance(call.get("function"), dict)
