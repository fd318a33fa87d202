"""Headers of safetensors files, read with the standard library and trusted in nothing.

A file is an 8-byte little-endian length N, N bytes of JSON, then the data. Accepted is only what leaves no byte of the
data unexplained: every tensor's bytes follow the previous one's, the last ends where the file does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqserve.format.errors import TensorError
from vqserve.format.layout import DTYPE_BYTES
from vqserve.format.strict_json import LFS_POINTER, LFS_REMEDY, parse_object

MAX_HEADER_BYTES = 100_000_000

_RESTORE = "restore the file from where the checkpoint came from"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file's header describes it.

    Attributes:
        dtype: Safetensors dtype, e.g. `U8`.
        path: The file.
        offset: First byte of the data, counted from the start of the file.
        nbytes: Bytes of the data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    def read(self) -> bytes:
        """The tensor's raw little-endian bytes.

        Raises:
            TensorError: The file cannot be read or has been cut since its header was checked.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.nbytes)
        except OSError as cause:
            raise TensorError(str(self.path), f"cannot be read: {cause.strerror}", "check its permissions") from cause
        if len(data) != self.nbytes:
            problem = f"expected {self.nbytes} bytes at {self.offset}, found {len(data)}"
            raise TensorError(f"{self.path}: {self.name}", problem, _RESTORE)
        return data


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads and checks the header of a safetensors file.

    Returns:
        Its tensors by name, in the order of their data.

    Raises:
        TensorError: The file cannot be read, or deviates from the format in any way.
    """
    where = str(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == LFS_POINTER[:8]:
                raise TensorError(where, "expected weights, found a Git LFS pointer to them", LFS_REMEDY)
            length = int.from_bytes(start, "little")
            if len(start) < 8:
                raise TensorError(where, f"expected a header length of 8 bytes, found a file of {size}", _RESTORE)
            if length > MAX_HEADER_BYTES or length > size - 8:
                problem = f"expected a header of at most {min(MAX_HEADER_BYTES, size - 8)} bytes, found {length}"
                raise TensorError(where, problem, _RESTORE)
            header = parse_object(file.read(length), f"{where}: header", TensorError)
    except OSError as cause:
        raise TensorError(where, f"cannot be read: {cause.strerror}", "check the path and its permissions") from cause
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorError(f"{where}: __metadata__", "expected an object of strings", _RESTORE)
    tensors = [_read_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "leaves bytes unused before it"
            problem = f"expected data at byte {end}, found it at {tensor.offset}: it {kind}"
            raise TensorError(f"{where}: {tensor.name}", problem, _RESTORE)
        end += tensor.nbytes
    if end != size:
        raise TensorError(where, f"expected {end} bytes as its header says, found {size}", _RESTORE)
    return {tensor.name: tensor for tensor in tensors}


def _read_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    where = f"{path}: {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise TensorError(where, "expected exactly the keys dtype, shape, data_offsets", _RESTORE)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise TensorError(where, f"expected a dtype of {', '.join(DTYPE_BYTES)}, found {dtype!r}", _RESTORE)
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise TensorError(
            where, "expected a shape and two ascending data_offsets, all integers of at least 0", _RESTORE
        )
    nbytes = DTYPE_BYTES[dtype]
    for axis in shape:
        nbytes *= axis
    begin, end = offsets
    if end - begin != nbytes:
        problem = f"expected {nbytes} bytes for {dtype}{shape}, found {end - begin} in data_offsets"
        raise TensorError(where, problem, _RESTORE)
    return StoredTensor(name, dtype, tuple(shape), path, data_start + begin, nbytes)


def _are_sizes(value: object) -> bool:
    # An axis or offset of 2**63 cannot be of a real file and would only make the arithmetic slow.
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )
