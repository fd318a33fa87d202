"""Environment variables, most of them vqserve's own: how `vqserve serve` tells vLLM's processes what it decided."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Literal

from vqserve.format.errors import UsageError

WARM_UP_SECONDS = "VQSERVE_WARM_UP_SECONDS"
"""How long the warm-up may take; 600 if it is not set."""

STALL_SECONDS = "VQSERVE_STALL_SECONDS"
"""How long an engine that has requests may finish no step until `/live` calls it stuck; 120 if it is not set."""

SPINE = "VQSERVE_SPINE"
"""`packed`: the spine's layers are multiplied in 4 bit; `dequantized`: as the weights they stand for. If it is not set,
packed wherever vLLM can."""

ANTI_REPETITION = "VQSERVE_ANTI_REPETITION"
"""`STRENGTH[,MIN_LENGTH[,WINDOW]]` of the anti-repetition penalty; no penalty if it is not set."""

THINKING_BUDGET = "VQSERVE_THINKING_BUDGET"
"""Tokens after which thinking is closed where a request does not say; no limit if it is not set."""

COUNTERS = "VQSERVE_COUNTERS"
"""Path of the counters that engine processes write and the API server reads; nothing is counted if it is not set."""
COUNTERS_BYTES = 4096
"""Their size: of 256 engines."""

Spine = Literal["packed", "dequantized"]


@dataclass(frozen=True)
class AntiRepetition:
    """How repetitions are penalised, as `vqserve.reference.repetition` defines it.

    Attributes:
        strength: Logits per token of repetition, 0 to 100; 0 penalises nothing.
        min_length: Tokens that have to be repeated first, from 1 to less than `window`. With 12 and a strength of 1 the
            demo's 1111 × 11 went wrong, where a line of 26 tokens comes twice and has to.
        window: Generated tokens that are looked at, at most 16384.
    """

    strength: float
    min_length: int = 64
    window: int = 2048

    @staticmethod
    def parse(text: str, default: AntiRepetition | None = None) -> AntiRepetition:
        """Reads `STRENGTH[,MIN_LENGTH[,WINDOW]]`; what is left out is the default's.

        Raises:
            UsageError: That is not what `text` is; the message does not say whose it is.
        """
        number = r"[0-9]{1,3}(?:\.[0-9]{1,6})?"
        found = re.fullmatch(rf"({number})(?:,([0-9]{{1,5}}))?(?:,([0-9]{{1,5}}))?", text, re.ASCII)
        if found:
            default = default or AntiRepetition(0.0)
            strength, length, window = found.groups()
            setting = AntiRepetition(float(strength), int(length or default.min_length), int(window or default.window))
            if setting.strength <= 100 and 1 <= setting.min_length < setting.window <= 16384:
                return setting
        shape = "STRENGTH[,MIN_LENGTH[,WINDOW]] with a strength of 0 to 100 and 1 <= MIN_LENGTH < WINDOW <= 16384"
        raise UsageError(f"expected {shape}, such as 0.5 or 0.5,64,2048")


def api_key() -> str | None:
    """What vLLM's own `VLLM_API_KEY` says: the key that a server asks for, and that its clients send.

    Raises:
        UsageError: No header of HTTP can hold it.
    """
    key = os.environ.get("VLLM_API_KEY", "")
    if not (key.isascii() and key.isprintable()):
        problem = "expected printable ASCII, as a header of HTTP has it; a line break at its end counts, too"
        raise UsageError(f"VLLM_API_KEY: {problem}: correct the variable, or the Secret that it is from")
    return key or None


def warm_up_seconds() -> float:
    """What `WARM_UP_SECONDS` says.

    Raises:
        UsageError: No number of seconds, or one that is not above 0 and finite.
    """
    return _seconds(WARM_UP_SECONDS, "600")


def stall_seconds() -> float:
    """What `STALL_SECONDS` says.

    Raises:
        UsageError: No number of seconds, or one that is not above 0 and finite.
    """
    return _seconds(STALL_SECONDS, "120")


def wanted_spine() -> Spine | None:
    """What `SPINE` says.

    Raises:
        UsageError: Something that it cannot say.
    """
    text = os.environ.get(SPINE)
    if text in ("packed", "dequantized"):
        return "packed" if text == "packed" else "dequantized"
    if text:
        raise UsageError(f"{SPINE}={text}: expected packed or dequantized; set it to one of them, or unset it")
    return None


def anti_repetition() -> AntiRepetition | None:
    """What `ANTI_REPETITION` says.

    Raises:
        UsageError: Something that it cannot say.
    """
    text = os.environ.get(ANTI_REPETITION)
    if not text:
        return None
    try:
        return AntiRepetition.parse(text)
    except UsageError as error:
        raise UsageError(f"{ANTI_REPETITION}={text}: {error}; set it so, or unset it") from error


def thinking_budget() -> int | None:
    """What `THINKING_BUDGET` says, in tokens.

    Raises:
        UsageError: No whole number of at least 1.
    """
    text = os.environ.get(THINKING_BUDGET)
    if not text:
        return None
    if re.fullmatch("[0-9]{1,15}", text, re.ASCII) is None or int(text) == 0:
        raise UsageError(f"{THINKING_BUDGET}={text}: expected a number of tokens, at least 1; set it so, or unset it")
    return int(text)


def _seconds(name: str, default: str) -> float:
    text = os.environ.get(name) or default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{name}={text}: expected a number of seconds; set it, or unset it")
    return seconds
