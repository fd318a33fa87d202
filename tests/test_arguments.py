"""Types of command-line arguments."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

from vqserve.arguments import positive, seed, size


@pytest.mark.parametrize(
    ("text", "found"), [("1", 1), ("512B", 512), ("3K", 3072), ("500MiB", 500 * 2**20), (" 95 GiB ", 95 * 2**30)]
)
def test_sizes_are_in_powers_of_1024(text: str, found: int) -> None:
    assert size(text) == found


@pytest.mark.parametrize(
    "text", ["", "0", "0GiB", "-1", "1.5GiB", "4TiB", "4 bytes", "GiB", "huge", "\u0661KiB", "9" * 400 + "GiB"]
)
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="is not a size such as 500MiB or 4GiB"):
        size(text)


def test_a_count_is_at_least_one() -> None:
    assert positive("1") == 1
    assert positive("0300") == 300
    for text in ("", "0", "-1", "+1", "1.0", "abc", "1_000", "²", "\u0661", "9" * 400, "9" * 5000):
        with pytest.raises(ArgumentTypeError, match="is not a whole number of at least 1"):
            positive(text)


def test_a_seed_is_what_every_generator_takes() -> None:
    assert [seed("0"), seed(str(2**32 - 1))] == [0, 2**32 - 1]
    for text in ("", "-1", "+1", "1.0", "abc", "1_000", str(2**32), str(10**30), "9" * 5000):
        with pytest.raises(ArgumentTypeError, match="is not a whole number from 0 to 4294967295"):
            seed(text)
