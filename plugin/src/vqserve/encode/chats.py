"""One line of a calibration file as the prompt that a server would render, and the text a model would have answered.

Chats go through the checkpoint's own chat template, with messages as vLLM hands them to it. The answer is the last
message, if it is the assistant's: what follows the prompt that asks for it, thinking included.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from vqserve.format.errors import CheckpointError, UsageError
from vqserve.format.strict_json import parse_object

_SCHEMA = (
    'expected {"messages": [{"role": ..., "content": ...}, ...]} and perhaps "tools" and "chat_template_kwargs", '
    '{"prompt": "...", "completion": "..."} or {"text": "..."}'
)
_OPEN, _CLOSE = "<think>", "</think>"
_SWITCHES = {"enable_thinking", "thinking"}
_RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "conversations", "messages"}
"""Names that `apply_chat_template` takes for itself, or gives to the template."""
_RENDERED = 'give "prompt" and "completion", rendered as the model writes them'


def parse_line(line: str, where: str) -> dict[str, Any]:
    """Reads one line.

    Raises:
        UsageError: It is not JSON, has a key twice, or is not what a line may be.
    """
    record = _parse(line, where, "give one JSON object per line")
    if not _fits(record):
        raise UsageError(f"{where}: {_SCHEMA}")
    if reserved := sorted(_RESERVED & set(record.get("chat_template_kwargs", {}))):
        problem = f"chat_template_kwargs may not set {', '.join(map(repr, reserved))}"
        remedy = "leave that to the encoder; variables of the chat template's own may be set, such as enable_thinking"
        raise _refusal(where, problem, remedy)
    return record


def render(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, str]:
    """The prompt, whose predictions do not count, and the whole text that begins with it.

    A chat that does not end with the assistant is all prompt.

    Raises:
        UsageError: The template refuses the messages, leaves out a part of the answer, or renders it unlike what it
            asks the model for.
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
            prompt = self._apply(self._messages, add_generation_prompt=True)
            return prompt, prompt
        reasoning, content = _thoughts(last)
        if not reasoning and content.lstrip().startswith(_OPEN):
            return self._cut_off(content.lstrip().removeprefix(_OPEN))
        whole = self._apply(self._messages)
        self._check_arguments(whole)
        calls = [("tool calls", str(call["function"]["name"])) for call in last.get("tool_calls") or ()]
        parts = [("thinking", reasoning), ("content", content), *calls]
        choices: list[dict[str, Any]] = [{}]
        if not reasoning.strip() and not _SWITCHES & set(self._options):
            choices.append({"enable_thinking": False})
        asked = [self._apply(before, add_generation_prompt=True, **choice) for choice in choices]
        prompt, missing = next(filter(whole.startswith, asked), asked[-1]), None
        if whole.startswith(prompt):
            missing = _missing(whole[len(prompt) :], parts)
            if missing is None:
                return prompt, whole
        if reasoning.strip() and prompt.endswith(_OPEN) and whole.startswith(prompt.removesuffix(_OPEN)):
            rest = _without_thinking(whole[len(prompt) - len(_OPEN) :])
            if rest is not None:  # the template drops the thinking of an answer that is finished
                missing = _missing(rest, parts[1:])
                if missing is None:
                    return prompt, f"{prompt}{reasoning}{_CLOSE}{rest}"
        if missing:
            raise self._leaves_out(missing)
        problem = f"the chat template asks for an answer with {prompt[-20:]!r}, and renders this one otherwise"
        remedy = (
            'say "chat_template_kwargs": {"enable_thinking": ...} as the answer is, or give "prompt" and "completion"'
        )
        raise _refusal(self._where, problem, remedy)

    def _cut_off(self, thinking: str) -> tuple[str, str]:
        """An answer that ended before its thinking did, as generated: no template closes it where it has no end."""
        *before, last = self._messages
        prompt = self._apply(before, add_generation_prompt=True)
        if last.get("tool_calls") or not prompt.endswith(_OPEN):
            problem = f"{_OPEN} of the answer has no {_CLOSE}, and the chat template does not ask for such an answer"
            raise _refusal(self._where, problem, f"close it, or {_RENDERED}")
        return prompt, prompt + thinking

    def _check_arguments(self, whole: str) -> None:
        """Arguments are rendered in many ways, but a text that is the same without them lacks them."""
        *before, last = self._messages
        calls = last.get("tool_calls") or []
        for at, call in enumerate(calls):
            bare = {**call, "function": {**call["function"], "arguments": {}}}
            others = [*calls[:at], bare, *calls[at + 1 :]]
            if bare != call and self._apply([*before, {**last, "tool_calls": others}]) == whole:
                raise self._leaves_out("tool calls")

    def _leaves_out(self, part: str) -> UsageError:
        return _refusal(self._where, f"the chat template leaves out or alters the {part} of the answer", _RENDERED)

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return _rendered(self._tokenizer, messages, **{**self._options, **options})
        except _TemplateRefusal as error:
            problem = f"the chat template refuses these messages ({error})"
            raise _refusal(self._where, problem, "correct them") from error


class _TemplateRefusal(Exception):
    """What a template raised, by type and message."""


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is a program, and fails as programs do
        raise _TemplateRefusal(f"{type(error).__name__}: {error}") from error


def _as_served(message: Mapping[str, Any], takes_parts: bool, where: str) -> dict[str, Any]:
    """A message as vLLM hands it to the template.

    Null content is empty, parts are joined if the template takes none, arguments of tool calls are objects, reasoning
    stands under both of its names.
    """
    served, content = dict(message), message.get("content")
    if isinstance(content, list) and not takes_parts:
        content = "\n".join(part["text"] for part in content)
    served["content"] = "" if content is None else content
    if reasoning := {text for key in ("reasoning", "reasoning_content") if (text := message.get(key))}:
        if len(reasoning) > 1:
            raise UsageError(f'{where}: "reasoning" and "reasoning_content" of a message differ; give one of them')
        served["reasoning_content"] = served["reasoning"] = reasoning.pop()
    if calls := message.get("tool_calls"):
        served["tool_calls"] = [_with_arguments(call, where) for call in calls]
    return served


def _with_arguments(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments, where = call["function"].get("arguments"), f"{where}, arguments of a tool call"
    if not arguments or arguments == "null":
        arguments = {}
    elif isinstance(arguments, str):
        arguments = _parse(arguments, where, "correct them")
    elif not isinstance(arguments, dict):
        raise UsageError(f"{where}: expected a JSON object, found {type(arguments).__name__}; correct them")
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _thoughts(message: Mapping[str, Any]) -> tuple[str, str]:
    """Thinking and answer of a message, whether the thinking is in a field of its own or in front of the content."""
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    if reasoning := message.get("reasoning_content"):
        return str(reasoning), text
    before, _, after = text.rpartition(_CLOSE)
    inner = before.lstrip()
    return inner.removeprefix(_OPEN) if inner.startswith(_OPEN) else before, after


def _without_thinking(answer: str) -> str | None:
    """What follows an answer's empty thinking, if it is empty or not there."""
    before, mark, after = answer.partition(_CLOSE)
    if not mark:
        return answer
    return after if before.strip() in {"", _OPEN} else None


def _missing(text: str, parts: Sequence[tuple[str, str]]) -> str | None:
    """The name of the first part that the text lacks, if any; they stand in order, perhaps with their ends stripped."""
    at = 0
    for name, part in parts:
        at = text.find(part.strip(), at)
        if at < 0:
            return name
        at += len(part.strip())
    return None


def _takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template makes text of a list of parts; others would print it as Python does."""
    try:
        rendered = _rendered(tokenizer, [{"role": "user", "content": [{"type": "text", "text": "probe"}]}])
    except _TemplateRefusal:
        return False
    return "probe" in rendered and "'type'" not in rendered


def _parse(text: str, where: str, remedy: str) -> dict[str, Any]:
    try:
        return parse_object(text.encode("utf-8", "surrogatepass"), where)
    except CheckpointError as error:
        raise _refusal(where, error.problem, remedy) from error


def _refusal(where: str, problem: str, remedy: str) -> UsageError:
    """One line, whatever the row or the template says."""
    return UsageError(str(CheckpointError(where, problem, remedy)))


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
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)
