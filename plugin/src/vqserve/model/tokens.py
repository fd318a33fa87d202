"""Sequences of tokens, flat, and the padded batches that a model takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vqserve.format.errors import UsageError

BATCH_TOKENS = 4096


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


def check_characters(text: str, where: str) -> None:
    """Checks that a text can be tokenized: JSON can write half of a surrogate pair, which is no character.

    Raises:
        UsageError: Half of one is in it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UsageError(f"{where}: {half} without its other half is no character; correct the text") from error
