"""The place in a checkpoint's model card (`README.md`) where measured scores go."""

from __future__ import annotations

from vqserve.format.errors import CheckpointError

CARD = "README.md"
_BEGIN, _END = "<!-- scores: begin -->", "<!-- scores: end -->"


def scores_section(text: str) -> str:
    """Markdown that `with_scores` finds again."""
    return f"{_BEGIN}\n{text.strip()}\n{_END}"


def with_scores(card: str, scores: str) -> str:
    """The card with its scores replaced.

    Raises:
        CheckpointError: It has no place for them.
    """
    begin, end = card.find(_BEGIN), card.find(_END)
    if not 0 <= begin < end:
        raise CheckpointError(CARD, f"has no place for scores ({_BEGIN} ... {_END})", "put both lines into it")
    return card[:begin] + scores_section(scores) + card[end + len(_END) :]
