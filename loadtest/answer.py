"""An answer as it streams in: what each event adds, and which class the whole falls into."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from loadtest.records import Outcome

DONE = "[DONE]"
OVER_CAP_WORDS = ("maximum context length", "maximum model length", "max_model_len", "longer than the maximum")
"""How vLLM 0.32 says that a request is too long; proxies and other servers put the first one alike."""
REPEATED_CHARACTERS, REPEATED_TIMES, LONGEST_UNIT = 64, 4, 200
"""A loop: some unit of up to 200 characters, four times or more and for 64 characters at least, at an answer's end."""


class Broken(Exception):
    """The request failed: its class and why."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome, self.detail = outcome, detail


def outcome_of_status(status: int, message: str) -> Outcome:
    """The class of an HTTP status other than 200, or of an error's code within a stream."""
    if status in (429, 503):
        return Outcome.SHED
    if status in (401, 403):
        return Outcome.UNAUTHORIZED
    if status == 400 and any(words in message for words in OVER_CAP_WORDS):
        return Outcome.OVER_CAP
    return Outcome.INVALID if 400 <= status < 500 else Outcome.SERVER_ERROR


def repeats(text: str) -> bool:
    """Whether a text ends in a loop."""
    for size in range(1, LONGEST_UNIT + 1):
        times = max(REPEATED_TIMES, math.ceil(REPEATED_CHARACTERS / size))
        if len(text) >= size * times and text.endswith(text[-size:] * times):
            return bool(text[-size:].strip())
    return False


@dataclass
class Answer:
    """What has come of one answer; times are those of `time.perf_counter()`."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    first: float | None = None
    first_content: float | None = None
    last: float | None = None
    gaps: list[float] = field(default_factory=list)
    gap_tokens: list[int] = field(default_factory=list)
    tokens_at_first: int | None = None
    tokens_at_last: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    done: bool = False

    def add(self, data: str, now: float) -> None:
        """Takes in the data of one event that came `now`.

        Raises:
            Broken: It is none, or tells of an error.
        """
        if data == DONE:
            self.done = True
            return
        try:
            event = json.loads(data)
            if error := event.get("error"):
                raise _told(error)
            choices = event["choices"]
            self._count(event.get("usage"))
            if choices:
                self._choose(choices[0], now)
        except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as cause:
            raise Broken(Outcome.GARBAGE, f"an event that is no chunk: {data[:80]!r}") from cause

    def _count(self, usage: dict[str, Any] | None) -> None:
        if usage is None:
            return
        self.prompt_tokens = int(usage["prompt_tokens"])
        self.completion_tokens = int(usage.get("completion_tokens") or 0)
        details = usage.get("prompt_tokens_details") or {}
        if (cached := details.get("cached_tokens")) is not None:
            self.cached_tokens = int(cached)

    def _choose(self, choice: dict[str, Any], now: float) -> None:
        delta = choice.get("delta") or {}
        self.finish_reason = _text(choice, "finish_reason") or self.finish_reason
        reasoning = _text(delta, "reasoning") or _text(delta, "reasoning_content")
        content = _text(delta, "content") or _text(choice, "text")
        if not reasoning and not content:
            return
        self.reasoning.append(reasoning)
        self.content.append(content)
        if content and self.first_content is None:
            self.first_content = now
        if self.last is None:
            self.first, self.tokens_at_first = now, self.completion_tokens
        else:
            self.gaps.append(now - self.last)
            if self.completion_tokens is not None and self.tokens_at_last is not None:
                self.gap_tokens.append(self.completion_tokens - self.tokens_at_last)
        self.last, self.tokens_at_last = now, self.completion_tokens

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first chunk; None if unknown."""
        if self.first is None or self.last is None or self.tokens_at_first is None or self.tokens_at_last is None:
            return None
        tokens = self.tokens_at_last - self.tokens_at_first
        return (self.last - self.first) / tokens if tokens > 0 else None

    @property
    def text(self) -> str:
        """The content without the reasoning."""
        return "".join(self.content)

    def judge(self, *, length_wanted: bool) -> None:
        """Looks at a stream that ended in order.

        Args:
            length_wanted: The request asked for exactly `max_tokens`.

        Raises:
            Broken: The answer is not what it should be.
        """
        if not self.done:
            raise Broken(Outcome.NO_DONE, "the stream ended without [DONE]")
        if self.first is None:
            raise Broken(Outcome.EMPTY, f"no text; finish_reason {self.finish_reason}")
        if self.finish_reason is None:
            raise Broken(Outcome.GARBAGE, "no finish_reason")
        if self.finish_reason in ("abort", "error"):
            raise Broken(Outcome.SERVER_ERROR, f"finish_reason {self.finish_reason}")
        if self.finish_reason == "repetition":
            raise Broken(Outcome.REPETITION, "ended by the server for repeating itself")
        if self.finish_reason == "length" and not length_wanted:
            looping = repeats(self.text or "".join(self.reasoning))
            outcome = Outcome.REPETITION if looping else Outcome.LENGTH
            raise Broken(outcome, f"max_tokens reached{' in a loop' if looping else ''}")


def _text(found: dict[str, Any], name: str) -> str:
    value = found.get(name) or ""
    if not isinstance(value, str):
        raise TypeError(f"{name} is no text")
    return value


def _told(error: Any) -> Broken:
    """An error within a stream."""
    message = str(error.get("message", "")) if isinstance(error, dict) else str(error)
    code = error.get("code") if isinstance(error, dict) else None
    return Broken(outcome_of_status(code if isinstance(code, int) else 500, message), f"in the stream: {message[:200]}")
