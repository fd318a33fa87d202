"""The anti-repetition penalty of `vqserve.reference.repetition`, for a batch, in a few operations of torch.

It keeps no state: what it needs are the last tokens of each request, which vLLM has. So preempted requests, recycled
slots and drafts of speculative decoding need no thought. R rows of logits, W tokens of window, C = `LONGEST`, V tokens
of vocabulary; -1 stands where a row has no token (yet), left of those it has.
"""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST = 128
"""Tokens of repetition beyond which the penalty grows no more. Loops get there, text that means to repeat hardly."""


def match_lengths(recent: Tensor, longest: int) -> Tensor:
    """How long the repetition is that each token of the window once prolonged.

    Args:
        recent: int [R, W], the last tokens of each row, the latest at the right, -1 left of the first.
        longest: Where to stop counting, at most 32767.

    Returns:
        int16 [R, W]: length of the longest common suffix of `recent[:, :j]` and `recent`; 0 where there is no token.
    """
    rows, width = recent.shape
    padded = torch.cat([recent.new_full((rows, longest), -1), recent], 1)
    before = padded.unfold(1, longest, 1)[:, :width]  # [R, W, C]: the C tokens before each
    # The last place at which they differ from the latest C tokens. Padding equals only padding, which a row that has
    # tokens reaches later at its end than at any earlier place.
    place = torch.arange(longest, dtype=torch.int16, device=recent.device)
    differs = torch.where(before == padded[:, None, width:], -1, place).amax(2)
    return torch.where(recent < 0, 0, longest - 1 - differs)


def penalties(recent: Tensor, strength: Tensor, min_length: Tensor) -> Tensor:
    """What each token of the window would cost if it came next, in logits.

    Args:
        recent: int [R, W], as above.
        strength: fp32 [R], logits per token of repetition.
        min_length: int [R], tokens that have to be repeated first, at least 1.

    Returns:
        fp32 [R, W].
    """
    return strength[:, None] * (match_lengths(recent, LONGEST) - min_length[:, None] + 1).clamp(min=0)


def repeats(recent: Tensor, min_length: int) -> bool:
    """Whether the last `min_length` tokens stand elsewhere in the window too, so that there is something to penalise.

    What saves rows on the CPU nearly all of the work. It waits for the device: not for rows on a GPU.

    Args:
        recent: int [W], a row that has tokens; W at least `min_length`.
        min_length: At least 1.
    """
    [ends] = (recent[min_length - 1 : -1] == recent[-1]).nonzero(as_tuple=True)
    return bool((recent.unfold(0, min_length, 1)[ends] == recent[-min_length:]).all(1).any())


def penalise(logits: Tensor, recent: Tensor, strength: Tensor, min_length: Tensor) -> Tensor:
    """Takes the penalties from the logits, in place.

    Args:
        logits: fp32 [R, V].
        recent: As for `penalties`.
        strength: As for `penalties`.
        min_length: As for `penalties`.

    Returns:
        bool [R]: Whether the likeliest token would have prolonged a repetition, and paid for it.
    """
    cost, tokens = penalties(recent, strength, min_length), recent.clamp(min=0).long()
    likeliest = logits.argmax(1, keepdim=True)
    # Of a token that stands there twice, the lowest result is that of the longest repetition.
    logits.scatter_reduce_(1, tokens, logits.gather(1, tokens) - cost, "amin")
    return ((tokens == likeliest) & (cost > 0)).any(1)
