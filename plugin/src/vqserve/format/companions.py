"""The files beside the weights: which a checkpoint may hold, and what vLLM takes from them before it answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vqserve.format.errors import CheckpointError, ManifestError
from vqserve.format.known_answers import KNOWN_ANSWERS
from vqserve.format.manifest import Report, plain_file, refuse
from vqserve.format.strict_json import read_object

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_KINDS = (".safetensors", ".json", ".jinja", ".md", ".txt", ".png", ".svg")
_TEXTS = ("LICENSE", "NOTICE")
_READ_ELSEWHERE = (_CONFIG, "model.safetensors.index.json", KNOWN_ANSWERS)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
_RESTORE = "restore the file from where the checkpoint came from"
_REMOVE = "take it out of the folder and of manifest.json, or do not use this checkpoint"

Problems = Iterator[tuple[str, str]]
"""Keys, each with what was expected and found."""


def check_companions(
    folder: Path,
    files: Iterable[str],
    config: Mapping[str, Any],
    vocab_size: int,
    report: Report = refuse,
    *,
    links: bool = False,
) -> None:
    """Checks that a checkpoint holds no file of another kind, no call for code, and JSON that vLLM can start with.

    Args:
        folder: The checkpoint.
        files: The names in its manifest.
        config: Its parsed `config.json`.
        vocab_size: How many tokens the model has.
        report: What is done with something wrong.
        links: Whether the files may be links to files outside.

    Raises:
        CheckpointError: With `refuse`: the first thing that is wrong.
    """
    contents = {_CONFIG: config}
    for name in files:
        if not name.endswith(_KINDS) and name not in _TEXTS:
            problem = f"expected a file in one of {', '.join(_KINDS)}, or {' or '.join(_TEXTS)}"
            report(ManifestError(str(folder / name), problem, _REMOVE))
    for name in sorted({TOKENIZER, *(name for name in files if name.endswith(".json"))}.difference(_READ_ELSEWHERE)):
        try:
            contents[name] = read_object(plain_file(folder, name, "the checkpoint", links=links))
        except CheckpointError as problem_of_file:
            report(problem_of_file)
    for name, content in contents.items():
        if "auto_map" in content:
            problem = "names Python code for vLLM to run, and a checkpoint has none"
            report(
                CheckpointError(f"{folder / name}: auto_map", problem, "remove the key, or do not use this checkpoint")
            )
        for key, problem in _problems(name, content, vocab_size):
            report(CheckpointError(f"{folder / name}: {key}", problem, _RESTORE))


def _problems(name: str, content: Mapping[str, Any], vocab_size: int) -> Problems:
    if name in (_CONFIG, _GENERATION):
        yield from _special_tokens(content, vocab_size)
    if name == _GENERATION:
        yield from _sampling(content)
    if name == TOKENIZER:
        yield from _vocabulary(content, vocab_size)


def _special_tokens(content: Mapping[str, Any], vocab_size: int) -> Problems:
    for key in _TOKENS:
        value = content.get(key)
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if not _is_token(token, vocab_size):
                yield key, _expected_token(token, vocab_size)
                break


def _sampling(content: Mapping[str, Any]) -> Problems:
    for key in _SAMPLING:
        value = content.get(key)
        if value is not None and (type(value) not in (int, float) or not abs(value) < math.inf):
            yield key, f"expected a number, found {value!r}"


def _vocabulary(content: Mapping[str, Any], vocab_size: int) -> Problems:
    model, added = content.get("model"), content.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, list):
        vocabulary = {str(at): at for at in range(len(vocabulary))}
    if not isinstance(vocabulary, Mapping):
        yield "model.vocab", f"expected the tokens, found {type(vocabulary).__name__}"
        return
    if not isinstance(added, list) or not all(isinstance(token, Mapping) for token in added):
        yield "added_tokens", "expected a list of objects"
        return
    for key, tokens in (("model.vocab", vocabulary.values()), ("added_tokens", [token.get("id") for token in added])):
        wrong = next((token for token in tokens if not _is_token(token, vocab_size)), vocab_size - 1)
        if not _is_token(wrong, vocab_size):
            yield key, _expected_token(wrong, vocab_size)


def _is_token(value: object, vocab_size: int) -> bool:
    return type(value) is int and 0 <= value < vocab_size


def _expected_token(found: object, vocab_size: int) -> str:
    return f"expected token ids from 0 to {vocab_size - 1}, found {found!r}"
