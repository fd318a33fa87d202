from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from vqserve.format.errors import CheckpointError
from vqserve.format.known_answers import KNOWN_ANSWERS, KnownAnswer, read_known_answers

DOCUMENT = Path(__file__).parents[2] / "plugin" / "FORMAT.md"


@pytest.fixture
def content() -> dict[str, Any]:
    """The example in the format's document."""
    [example] = re.findall(r'```json\n(\{\s+"version".*?)```', DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    value: dict[str, Any] = json.loads(example)
    return value


def write(folder: Path, content: object) -> Path:
    (folder / KNOWN_ANSWERS).write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_the_example_in_the_document_is_read(tmp_path: Path, content: dict[str, Any]) -> None:
    assert read_known_answers(write(tmp_path, content)) == (
        KnownAnswer(({"role": "user", "content": "What is 36 * 47?"},), "1692", 64, {"enable_thinking": False}),
    )


def test_a_prompt_needs_no_options_for_the_chat_template(tmp_path: Path, content: dict[str, Any]) -> None:
    del content["prompts"][0]["chat_template_kwargs"]
    [prompt] = read_known_answers(write(tmp_path, content))
    assert prompt.chat_template_kwargs == {}


def test_a_checkpoint_without_the_file_has_none(tmp_path: Path) -> None:
    assert read_known_answers(tmp_path) == ()


PROMPT = ("prompts", 0)
MESSAGE = (*PROMPT, "messages", 0)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("version",), 2, "version: expected 1, found 2"),
        (("version",), True, "version: expected 1, found True"),
        (("more",), 1, "unknown key 'more' (known: version, prompts)"),
        (("prompts",), {}, "prompts: expected a list with at least one prompt"),
        (("prompts",), [], "prompts: expected a list with at least one prompt"),
        (PROMPT, "12 + 34 = ?", "prompts[0]: expected an object, found str"),
        ((*PROMPT, "seed"), 1, "prompts[0]: unknown key 'seed'"),
        ((*PROMPT, "messages"), [], "prompts[0].messages: expected a list with at least one message"),
        (MESSAGE, {"role": "user"}, "prompts[0].messages[0]: key 'content' is missing"),
        ((*MESSAGE, "content"), "", "prompts[0].messages[0].content: expected text, found ''"),
        ((*MESSAGE, "role"), None, "prompts[0].messages[0].role: expected text, found None"),
        ((*PROMPT, "answer"), "", "prompts[0].answer: expected text, found ''"),
        ((*PROMPT, "answer"), 1692, "prompts[0].answer: expected text, found 1692"),
        ((*PROMPT, "max_tokens"), 0, "prompts[0].max_tokens: expected a whole number of at least 1, found 0"),
        ((*PROMPT, "max_tokens"), True, "prompts[0].max_tokens: expected a whole number of at least 1, found True"),
        ((*PROMPT, "chat_template_kwargs"), [], "prompts[0].chat_template_kwargs: expected an object, found list"),
    ],
)
def test_an_impossible_value_is_refused_with_its_place(
    path: tuple[str | int, ...], value: object, problem: str, tmp_path: Path, content: dict[str, Any]
) -> None:
    target: Any = content
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(CheckpointError) as refusal:
        read_known_answers(write(tmp_path, content))
    assert str(refusal.value).startswith(f"{tmp_path / KNOWN_ANSWERS}: ")
    assert problem in str(refusal.value)


@pytest.mark.parametrize("key", ["messages", "max_tokens", "answer"])
def test_a_missing_key_is_named(key: str, tmp_path: Path, content: dict[str, Any]) -> None:
    broken = copy.deepcopy(content)
    del broken["prompts"][0][key]
    with pytest.raises(CheckpointError, match=re.escape(f"prompts[0]: key '{key}' is missing")):
        read_known_answers(write(tmp_path, broken))


@pytest.mark.parametrize("key", ["version", "prompts"])
def test_a_missing_key_of_the_file_is_named(key: str, tmp_path: Path, content: dict[str, Any]) -> None:
    del content[key]
    with pytest.raises(CheckpointError, match=f"key '{key}' is missing"):
        read_known_answers(write(tmp_path, content))
