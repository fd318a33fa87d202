from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqserve.format.errors import CheckpointError, ManifestError
from vqserve.format.strict_json import parse_object, read_object


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "an error"),
        (b"[1]", "found list"),
        (b"null", "found NoneType"),
        (b'{"a": 1', "an error"),
        (b'{"a": 1, "a": 2}', "key 'a' occurs 2 times"),
        (b'{"x": {"a\\u0000": 1, "a\\u0000": 2}}', "occurs 2 times"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": "\xff"}', "found byte 0xff at 7"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an error"),
    ],
)
def test_anything_but_one_plain_object_is_refused_in_one_line(data: bytes, found: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        parse_object(data, "file.json")
    assert str(refused.value).startswith("file.json: expected")
    assert found in str(refused.value)
    assert str(refused.value).isprintable()


@given(st.binary())
def test_random_bytes_are_parsed_or_refused(data: bytes) -> None:
    try:
        assert isinstance(parse_object(data, "file.json"), dict)
    except CheckpointError as refused:
        assert str(refused).isprintable()  # noqa: PT017 - either way is right


def test_a_file_that_cannot_be_read_is_the_caller_s_kind_of_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read: Is a directory"):
        read_object(tmp_path, ManifestError)
