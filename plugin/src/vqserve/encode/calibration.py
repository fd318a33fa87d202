"""Calibration text: JSON lines, rendered by the checkpoint's own tokenizer and chat template, as flat tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from vqserve.encode.chats import parse_line, render
from vqserve.format.errors import UsageError
from vqserve.model.tokens import Tokens, check_characters

FEW_PREDICTIONS = 2**14
"""Fewer predictions that count than this are warned of; the demo is encoded with twice as many."""


@dataclass(frozen=True)
class Report:
    """What became of the lines of a calibration file.

    Attributes:
        rows: Lines with something on them.
        short: Of these, dropped for having less than two tokens.
        cut: Cut to `longest` tokens.
        silent: Kept, but without a prediction that counts: no answer, or none within `longest` tokens.
        tokens: Tokens kept.
        dropped: Tokens cut off.
        predictions: Predictions that count.
        longest: Most tokens of a line.
    """

    rows: int
    short: int
    cut: int
    silent: int
    tokens: int
    dropped: int
    predictions: int
    longest: int

    def __str__(self) -> str:
        parts = [f"{self.rows:,} lines, {self.tokens:,} tokens, {self.predictions:,} predictions that count"]
        if self.cut:
            parts.append(f"{self.cut:,} lines cut to {self.longest:,} tokens ({self.dropped:,} tokens lost)")
        if self.silent:
            parts.append(f"{self.silent:,} lines without an answer that counts")
        if self.short:
            parts.append(f"{self.short:,} lines dropped, having less than two tokens")
        return "; ".join(parts)


def read_calibration(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, longest: int, seed: int
) -> tuple[Tokens, Report]:
    """Reads, renders and tokenizes a calibration file.

    Args:
        path: JSON lines, one object each: `messages` (rendered by the chat template, with `tools` and
            `chat_template_kwargs`), `prompt` and `completion` (rendered already), or `text`.
        tokenizer: Of the parent checkpoint.
        longest: Sequences are cut to so many tokens.
        seed: Of the order of sequences: the leading ones serve for held-out errors and sensitivity.

    Raises:
        UsageError: The file cannot be read, is empty, a line is not what is expected, or no prediction counts.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"calibration file {path}: cannot be read as UTF-8 text ({error}); give a JSON Lines file"
        ) from error
    sequences, rows, cut, dropped = [], 0, 0, 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"calibration file {path}, line {number}"
        prompt, text = render(parse_line(line, where), tokenizer, where)
        check_characters(text, where)
        whole = _tokenize(prompt, text, tokenizer)
        sequence = [*whole[: longest - 1], (whole[longest - 1][0], False)] if len(whole) > longest else whole
        rows, cut, dropped = rows + 1, cut + (len(whole) > longest), dropped + len(whole) - len(sequence)
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
            "end chats with an answer, give completions, or shorter prompts"
        )
    tokens = Tokens(torch.tensor(ids), torch.tensor(predicts), tuple(len(sequence) for sequence in sequences))
    silent = sum(not any(counts for _, counts in sequence) for sequence in sequences)
    short = rows - len(sequences)
    return tokens, Report(rows, short, cut, silent, len(ids), dropped, sum(predicts), longest)


def _tokenize(prompt: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, bool]]:
    """Pairs of a token and whether the prediction made at it counts."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in found["offset_mapping"]]
    counts = [start >= len(prompt) for start in starts[1:]]
    return list(zip(found["input_ids"], [*counts, False], strict=False))  # an empty text has no token
