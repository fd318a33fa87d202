"""Prompts from a JSONL file, one object a line: `messages` or `prompt`, and if wanted the keys of `OPTIONAL`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loadtest.prompts import LANGUAGES, Message, Prompt

OPTIONAL = {"answer": str, "kind": str, "language": str, "max_tokens": int}
ROLES = ("system", "user", "assistant")


class ReplayError(ValueError):
    """A file or line that cannot be replayed; says file, line and what to do."""


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """All prompts of a file, in its order.

    Raises:
        ReplayError: The file cannot be read or a line is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as cause:
        raise ReplayError(f"{path}: cannot be read ({cause}); name a JSONL file in UTF-8") from cause
    found = [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ReplayError(f'{path}: holds no prompt; write one JSON object a line, such as {{"prompt": "12 + 34 = ?"}}')
    return tuple(found)


def _prompt(line: str, where: str) -> Prompt:
    try:
        found = json.loads(line)
    except ValueError as cause:
        raise ReplayError(f"{where}: no JSON ({cause}); write one object a line") from cause
    if not isinstance(found, dict):
        raise ReplayError(f"{where}: expected an object, found {type(found).__name__}")
    if unknown := sorted(found.keys() - {"messages", "prompt", *OPTIONAL}):
        raise ReplayError(f"{where}: unknown key `{unknown[0]}`; known are messages, prompt, {', '.join(OPTIONAL)}")
    if ("messages" in found) == ("prompt" in found):
        raise ReplayError(f"{where}: expected either `messages` or `prompt`")
    for key, kind in OPTIONAL.items():
        if key in found and type(found[key]) is not kind:
            raise ReplayError(f"{where}: `{key}`: expected {kind.__name__}, found {json.dumps(found[key])[:40]}")
    if found.get("max_tokens", 1) < 1:
        raise ReplayError(f"{where}: `max_tokens`: expected 1 or more, found {found['max_tokens']}")
    if found.get("language", "en") not in LANGUAGES:
        raise ReplayError(f"{where}: `language`: expected one of {', '.join(LANGUAGES)}, found {found['language']}")
    messages = _messages(found, where)
    max_tokens, kind = found.get("max_tokens"), found.get("kind", "replay")
    return Prompt(kind, found.get("language"), messages, found.get("answer"), max_tokens=max_tokens)


def _messages(found: dict[str, Any], where: str) -> tuple[Message, ...]:
    if "prompt" in found:
        if not isinstance(found["prompt"], str) or not found["prompt"]:
            raise ReplayError(f"{where}: `prompt`: expected a text that is not empty")
        return (Message("user", found["prompt"]),)
    messages = found["messages"]
    if not isinstance(messages, list) or not messages:
        raise ReplayError(f"{where}: `messages`: expected a list that is not empty")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ReplayError(f"{where}: messages[{index}]: expected an object of `role` and `content`")
        if message["role"] not in ROLES or not isinstance(message["content"], str):
            raise ReplayError(
                f"{where}: messages[{index}]: expected a role of {', '.join(ROLES)} and a text as content"
            )
    return tuple(Message(**message) for message in messages)
