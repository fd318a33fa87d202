"""Calibration text: JSON lines, rendered by the checkpoint's own tokenizer and chat template, as flat tokens."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vqserve.format.errors import UsageError

BATCH_TOKENS = 4096
_SCHEMA = (
    'expected {"messages": [{"role": ..., "content": ...}, ...]} and perhaps "chat_template_kwargs", '
    '{"prompt": "...", "completion": "..."} or {"text": "..."}'
)


@dataclass(frozen=True)
class Batch:
    """Sequences of similar length, padded.

    Attributes:
        index: Flat position of every token, int64 `[B, S]`; padding repeats the sequence's last token.
        valid: False for padding, bool `[B, S]`.
    """

    index: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Tokens:
    """All sequences one after the other.

    Attributes:
        ids: Token ids, int64 `[T]`.
        predicts: Whether the model's prediction at this token counts, bool `[T]`: it is about a token of an answer.
        lengths: Tokens of each sequence.
    """

    ids: Tensor
    predicts: Tensor
    lengths: tuple[int, ...]

    def fingerprint(self) -> str:
        """sha256 of all that results depend on."""
        digest = hashlib.sha256(repr(self.lengths).encode())
        for tensor in (self.ids, self.predicts):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def head(self, limit: int) -> Tokens:
        """The leading sequences that together have at most `limit` tokens, one at least."""
        count = total = 0
        for length in self.lengths:
            if count and total + length > limit:
                break
            count, total = count + 1, total + length
        return Tokens(self.ids[:total], self.predicts[:total], self.lengths[:count])

    def batches(self) -> Iterator[Batch]:
        """Every sequence once, in batches of at most `BATCH_TOKENS` tokens with padding, or one sequence."""
        starts = torch.tensor((0, *self.lengths)).cumsum(0)
        waiting = sorted(range(len(self.lengths)), key=lambda at: self.lengths[at], reverse=True)
        while waiting:
            longest = self.lengths[waiting[0]]
            take = max(1, BATCH_TOKENS // longest)
            here, waiting = waiting[:take], waiting[take:]
            lengths = torch.tensor([self.lengths[at] for at in here])
            column = torch.arange(longest)
            index = starts[here][:, None] + torch.minimum(column, lengths[:, None] - 1)
            yield Batch(index, column < lengths[:, None])


def read_calibration(path: Path, tokenizer: PreTrainedTokenizerBase, *, longest: int, seed: int) -> Tokens:
    """Reads, renders and tokenizes a calibration file.

    Args:
        path: JSON lines, one object each: `messages` (rendered by the chat template, with `chat_template_kwargs`),
            `prompt` and `completion` (rendered already), or `text`.
        tokenizer: Of the parent checkpoint.
        longest: Sequences are cut to so many tokens.
        seed: Of the order of sequences: the leading ones serve for held-out errors and sensitivity.

    Raises:
        UsageError: The file cannot be read, is empty, or a line is not what is expected.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"calibration file {path}: cannot be read as UTF-8 text ({error}); give a JSON Lines file"
        ) from error
    sequences = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"calibration file {path}, line {number}"
        prompt, text = _render(_parse(line, where), tokenizer, where)
        _check_characters(text, where)
        sequence = _tokenize(prompt, text, tokenizer, longest)
        if len(sequence) > 1:
            sequences.append(sequence)
    if not sequences:
        raise UsageError(
            f"calibration file {path}: no line with text; give a JSON Lines file with one chat or text per line"
        )
    random.Random(seed).shuffle(sequences)
    pairs = [pair for sequence in sequences for pair in sequence]
    ids, predicts = zip(*pairs, strict=True)
    if not any(predicts):
        raise UsageError(
            f"calibration file {path}: no token of an answer within {longest} tokens of a line's begin; "
            "give completions, or shorter prompts"
        )
    return Tokens(torch.tensor(ids), torch.tensor(predicts), tuple(len(sequence) for sequence in sequences))


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error}); give one JSON object per line") from error
    if not isinstance(record, dict) or not _fits(record):
        raise UsageError(f"{where}: {_SCHEMA}")
    return record


def _fits(record: Mapping[str, Any]) -> bool:
    keys = set(record)
    if keys == {"text"} or keys == {"prompt", "completion"}:
        return all(isinstance(value, str) for value in record.values())
    if keys - {"chat_template_kwargs"} != {"messages"}:
        return False
    messages = record["messages"]
    return (
        isinstance(record.get("chat_template_kwargs", {}), dict)
        and isinstance(messages, list)
        and bool(messages)
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages)
    )


def _render(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, str]:
    """The prompt, whose predictions do not count, and the whole text that begins with it."""
    if "text" in record:
        return "", record["text"]
    if "prompt" in record:
        return record["prompt"], record["prompt"] + record["completion"]
    messages, options = record["messages"], record.get("chat_template_kwargs", {})
    answered = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered, **options)
        if not answered:
            return "", str(text)
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True, **options)
    except (TemplateError, ValueError, TypeError) as error:
        raise UsageError(f"{where}: the chat template refuses these messages ({error}); correct them") from error
    # Templates may render a past answer unlike the one being generated (thinking dropped): then every token counts.
    return (str(prompt) if str(text).startswith(str(prompt)) else ""), str(text)


def _check_characters(text: str, where: str) -> None:
    """JSON can write half of a surrogate pair, which is no character and has no token."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UsageError(f"{where}: {half} without its other half is no character; correct the text") from error


def _tokenize(prompt: str, text: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[tuple[int, bool]]:
    """Pairs of a token and whether the prediction made at it counts."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=True, max_length=longest)
    starts = [start for start, _ in found["offset_mapping"]]
    counts = [start >= len(prompt) for start in starts[1:]]
    return list(zip(found["input_ids"], [*counts, False], strict=False))  # an empty text has no token
