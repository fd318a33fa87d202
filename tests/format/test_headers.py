from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vqserve.format.errors import TensorError
from vqserve.format.headers import MAX_HEADER_BYTES, read_header


def _entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    as_list = [list(value) if isinstance(value, tuple) else value for value in (shape, offsets)]
    return {"dtype": dtype, "shape": as_list[0], "data_offsets": as_list[1]}


def _write(path: Path, header: object, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_a_file_written_by_safetensors_is_read_back(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "codes": torch.arange(24, dtype=torch.uint8).view(2, 3, 4),
        "scales": torch.rand(3, 5).half(),
        "kept": torch.rand(7).bfloat16(),
        "words": torch.arange(6, dtype=torch.int32),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(1.5),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].read() == tensor.flatten().view(torch.uint8).numpy().tobytes()
    assert found["codes"].dtype == "U8"
    assert found["kept"].dtype == "BF16"


@pytest.mark.parametrize(
    ("header", "data", "problem"),
    [
        ({"t": _entry()}, b"123", "expected .* bytes as its header says"),
        ({"t": _entry()}, b"12345", "expected .* bytes as its header says"),
        ({"t": _entry(offsets=(1, 5))}, b"12345", "leaves bytes unused"),
        ({"t": _entry(), "u": _entry(offsets=(3, 7))}, b"1234567", "u: .* overlaps"),
        ({"t": _entry(), "u": _entry(offsets=(5, 9))}, b"123456789", "u: .* leaves bytes unused"),
        ({"t": _entry(), "u": _entry(offsets=(0, 4))}, b"1234", "overlaps"),
        ({"t": _entry(offsets=(4, 0))}, b"", "two ascending data_offsets"),
        ({"t": _entry(offsets=(-4, 0))}, b"", "two ascending data_offsets"),
        ({"t": _entry(offsets=(0, 4, 8))}, b"1234", "two ascending data_offsets"),
        ({"t": _entry(offsets=(0, 4.0))}, b"1234", "all integers"),
        ({"t": _entry(offsets=(False, 4))}, b"1234", "all integers"),
        ({"t": _entry(offsets=None)}, b"1234", "all integers"),
        ({"t": _entry(shape=(5,))}, b"1234", r"expected 5 bytes for U8\[5\], found 4"),
        ({"t": _entry(shape=(-4,))}, b"1234", "all integers of at least 0"),
        ({"t": _entry(shape=(2**63,))}, b"1234", "all integers"),
        ({"t": _entry(shape=(1,) * 9)}, b"1234", "all integers"),
        ({"t": _entry(dtype="F64")}, b"1234", "expected a dtype of U8, .* found 'F64'"),
        ({"t": _entry(dtype=["U8"])}, b"1234", "expected a dtype"),
        ({"t": {**_entry(), "strides": [1]}}, b"1234", "exactly the keys"),
        ({"t": {"dtype": "U8", "shape": [4]}}, b"1234", "exactly the keys"),
        ({"t": [0, 4]}, b"1234", "exactly the keys"),
        ({"__metadata__": {"format": 1}}, b"", "__metadata__: expected an object of strings"),
        ({"__metadata__": []}, b"", "__metadata__: expected an object of strings"),
        ([], b"", "expected a JSON object, found list"),
        (b'{"t": 1, "t": 2}', b"", "occurs 2 times"),
        (b"{", b"", "expected JSON"),
        (b"", b"", "expected JSON"),
    ],
)
def test_every_deviation_is_refused_and_named(tmp_path: Path, header: object, data: bytes, problem: str) -> None:
    with pytest.raises(TensorError, match=problem) as refused:
        read_header(_write(tmp_path / "x.safetensors", header, data))
    assert "x.safetensors" in str(refused.value)


@pytest.mark.parametrize("length", [100, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_or_the_limit_is_not_read(tmp_path: Path, length: int) -> None:
    with pytest.raises(TensorError, match=f"found {length}"):
        read_header(_write(tmp_path / "x.safetensors", {}, b"", length))


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_too_short_for_a_length_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(TensorError, match=f"found a file of {len(content)}"):
        read_header(tmp_path / "x.safetensors")


def test_data_cut_off_after_the_header_was_read_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.safetensors", {"t": _entry()}, b"1234")
    tensor = read_header(path)["t"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TensorError, match=r"t: expected 4 bytes .* found 3"):
        tensor.read()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorError, match="cannot be read: No such file"):
        read_header(tmp_path / "x.safetensors")


@settings(max_examples=300)
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 400))
def test_a_damaged_file_is_refused_or_explained_byte_by_byte(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    _write(path, {"t": _entry(), "u": _entry("F16", (2, 3), (4, 16)), "__metadata__": {"format": "pt"}}, bytes(16))
    content = bytearray(path.read_bytes())
    content[at % len(content)] = byte
    path.write_bytes(content[: len(content) - (cut if cut < 100 else 0)])
    try:
        tensors = read_header(path)
    except TensorError as refused:
        assert str(refused).isprintable()  # noqa: PT017 - either way is right
        return
    first = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert first + sum(tensor.nbytes for tensor in tensors.values()) == path.stat().st_size
    assert all(len(tensor.read()) == tensor.nbytes for tensor in tensors.values())
