"""vqserve's own environment variables: how `vqserve serve` tells vLLM's processes what it decided."""

from __future__ import annotations

import math
import os
from typing import Literal

from vqserve.format.errors import UsageError

WARM_UP_SECONDS = "VQSERVE_WARM_UP_SECONDS"
"""How long the warm-up may take; 600 if it is not set."""

SPINE = "VQSERVE_SPINE"
"""`packed`: the spine's layers are multiplied in 4 bit; `dequantized`: as the weights they stand for. If it is not set,
packed wherever vLLM can."""

Spine = Literal["packed", "dequantized"]


def warm_up_seconds() -> float:
    """What `WARM_UP_SECONDS` says.

    Raises:
        UsageError: No number of seconds, or one that is not above 0 and finite.
    """
    text = os.environ.get(WARM_UP_SECONDS) or "600"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{WARM_UP_SECONDS}={text}: expected a number of seconds; set it, or unset it")
    return seconds


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
