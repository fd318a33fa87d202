"""What the anti-repetition penalty is, word for word: slow, exact, and the judge of `vllm_plugin.repetition`.

A token is penalised by how long a repetition it would prolong. Let `out` be what a request has generated (never its
prompt), cut to its last `window` tokens, and `m[j]` the length of the longest common suffix of `out[:j]` and `out`, at
most `longest`: how much of what was just written had been written before position `j` too. Token `out[j]` came next
then; if it comes next now, the repetition grows from `m[j]` tokens to `m[j] + 1`. Occurrences may overlap, so a loop is
its own repetition. The penalty of a token `t`, in logits, is

    strength * max over j with out[j] == t of max(0, m[j] - min_length + 1)

so nothing shorter than `min_length` is touched, every further token costs `strength` more, and a token that never
followed costs nothing. This is the match search of LZ77, after the LZ penalty (Ginart et al., arXiv:2504.20131), with
the match length itself in place of a code length: a loop's match grows up to `longest`, and with it what its next token
costs, while a repeated number, phrase or name ends before `min_length`.
"""

from __future__ import annotations

from collections.abc import Sequence


def penalties(out: Sequence[int], *, strength: float, min_length: int, window: int, longest: int) -> dict[int, float]:
    """The penalties above zero, in logits, by token.

    Args:
        out: Tokens that the request has generated so far, oldest first.
        strength: Logits per token of repetition, from `min_length` on.
        min_length: Tokens that have to be repeated before anything is penalised.
        window: Tokens at the end of `out` that are looked at.
        longest: Tokens of repetition beyond which the penalty grows no more.
    """
    recent = list(out[-window:])
    found: dict[int, float] = {}
    for j, token in enumerate(recent):
        length = min(_common_suffix(recent[:j], recent), longest)
        if length >= min_length:
            found[token] = max(found.get(token, 0.0), strength * (length - min_length + 1))
    return found


def _common_suffix(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return length
