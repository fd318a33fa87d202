"""Types of command-line arguments that several subcommands take, for argparse's `type`."""

from __future__ import annotations

import argparse
import re

_DIGITS = 15
"""More than anything counted here has; a float takes them."""
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def shortened(text: str) -> str:
    """A wrong argument for an error message: of a very long one, its beginning."""
    return text if len(text) <= 100 else f"{text[:100]}..."


def positive(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        ArgumentTypeError: It is not one.
    """
    if re.fullmatch(rf"[0-9]{{1,{_DIGITS}}}", text) is None or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{shortened(text)!r} is not a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """A whole number from 0 to 2**32 - 1, which every generator of random numbers takes.

    Raises:
        ArgumentTypeError: It is not one.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 100) or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def size(text: str) -> int:
    """A number of bytes, such as `500MiB` or `4GiB`; K, M and G are powers of 1024 with or without `iB`.

    Raises:
        ArgumentTypeError: It is not one, or 0.
    """
    found = re.fullmatch(rf"([0-9]{{1,{_DIGITS}}})\s*([KMG]?)(?:i?B)?", text.strip())
    if found is None or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{shortened(text)!r} is not a size such as 500MiB or 4GiB")
    return int(found[1]) * _UNITS[found[2]]
