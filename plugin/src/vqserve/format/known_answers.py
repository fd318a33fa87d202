"""`known_answers.json`: prompts that the model answered right before it was encoded, asked again before it is ready."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqserve.format.errors import CheckpointError
from vqserve.format.strict_json import check_record, read_object

KNOWN_ANSWERS = "known_answers.json"
KNOWN_ANSWERS_VERSION = 1

_MEND = "correct the file and its record in manifest.json, or restore the checkpoint from where it came from"


class KnownAnswersError(CheckpointError):
    """A `known_answers.json` with a missing, unknown or impossible value."""


@dataclass(frozen=True)
class KnownAnswer:
    """One prompt and what a right reply to it says.

    Attributes:
        messages: The conversation, each message with `role` and `content`.
        answer: What the reply's content, its thinking left out, has to contain.
        max_tokens: How long the reply may be, thinking included.
        chat_template_kwargs: What the chat template is told besides, e.g. `{"enable_thinking": False}`.
    """

    messages: tuple[Mapping[str, str], ...]
    answer: str
    max_tokens: int
    chat_template_kwargs: Mapping[str, Any]

    @classmethod
    def from_dict(cls, value: object, where: str) -> KnownAnswer:
        """Reads one record of `prompts`.

        Raises:
            KnownAnswersError: A key is missing or unknown, or a value is impossible.
        """
        record = _record(value, where, ("messages", "max_tokens", "answer"), optional=("chat_template_kwargs",))
        messages, answer, max_tokens = record["messages"], record["answer"], record["max_tokens"]
        if not isinstance(messages, list) or not messages:
            raise KnownAnswersError(f"{where}.messages", "expected a list with at least one message", _MEND)
        for at, message in enumerate(messages):
            _record(message, f"{where}.messages[{at}]", ("role", "content"))
            for key, text in message.items():
                _check_text(text, f"{where}.messages[{at}].{key}")
        _check_text(answer, f"{where}.answer")
        if type(max_tokens) is not int or max_tokens < 1:
            problem = f"expected a whole number of at least 1, found {max_tokens!r}"
            raise KnownAnswersError(f"{where}.max_tokens", problem, _MEND)
        options = record.get("chat_template_kwargs", {})
        if not isinstance(options, Mapping):
            problem = f"expected an object, found {type(options).__name__}"
            raise KnownAnswersError(f"{where}.chat_template_kwargs", problem, _MEND)
        return cls(tuple(messages), answer, max_tokens, options)


def read_known_answers(folder: Path) -> tuple[KnownAnswer, ...]:
    """The known answers of a checkpoint, quantized or not; none if it holds no such file.

    Raises:
        KnownAnswersError: The file is not valid, or of another version.
    """
    path = folder / KNOWN_ANSWERS
    if not path.exists():
        return ()
    content = read_object(path, KnownAnswersError)
    # The version comes first: a later version may well have other keys.
    version = content.get("version", KNOWN_ANSWERS_VERSION)
    if type(version) is not int or version != KNOWN_ANSWERS_VERSION:
        problem = f"expected {KNOWN_ANSWERS_VERSION}, found {version!r}"
        raise KnownAnswersError(f"{path}: version", problem, "install the vqserve release that knows it")
    prompts = _record(content, str(path), ("version", "prompts"))["prompts"]
    if not isinstance(prompts, list) or not prompts:
        raise KnownAnswersError(f"{path}: prompts", "expected a list with at least one prompt", _MEND)
    return tuple(KnownAnswer.from_dict(prompt, f"{path}: prompts[{at}]") for at, prompt in enumerate(prompts))


def _record(value: object, where: str, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    return check_record(value, where, KnownAnswersError, _MEND, keys, optional)


def _check_text(text: object, where: str) -> None:
    if not isinstance(text, str) or not text:
        raise KnownAnswersError(where, f"expected text, found {text!r}", _MEND)
