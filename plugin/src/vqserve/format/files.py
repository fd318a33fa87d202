"""Everything about a checkpoint that is checked before it is served, without reading the weights.

What is read here is JSON and safetensors; nothing is ever unpickled.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqserve.format.config import QuantConfig
from vqserve.format.errors import CheckpointError, ConfigError, TensorError
from vqserve.format.geometry import Geometry
from vqserve.format.headers import StoredTensor, read_header
from vqserve.format.layout import TensorSpec, checkpoint_specs
from vqserve.format.manifest import FileRecord, check_manifest, plain_file, read_manifest
from vqserve.format.names import codebook_name
from vqserve.format.strict_json import read_object

INDEX = "model.safetensors.index.json"
DIGEST_LIMIT = 1 << 30
"""Checkpoints below this many bytes have their sha256 checked at every start: it takes about a second."""

_REENCODE = "restore the checkpoint from where it came from, or encode it again"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has passed every check.

    Attributes:
        path: Its folder.
        config: The parsed `config.json`.
        quant: Its `quantization_config`.
        geometry: The model's sizes.
        files: Size and sha256 of every file by name, the manifest itself left out.
        specs: What every tensor must be, by name.
        tensors: Where every tensor is, by name.
    """

    path: Path
    config: Mapping[str, Any]
    quant: QuantConfig
    geometry: Geometry
    files: Mapping[str, FileRecord]
    specs: Mapping[str, TensorSpec]
    tensors: Mapping[str, StoredTensor]


def check_checkpoint(folder: Path, digests: bool | None = None) -> Checkpoint:
    """Checks configuration, manifest, file sizes, headers, every tensor's name, dtype and shape, and the codebooks.

    Args:
        folder: The checkpoint.
        digests: Whether to check the sha256 of every file; None means if all files together are below 1 GiB.

    Raises:
        CheckpointError: The first thing that is wrong, with file, tensor, expectation and remedy.
    """
    try:
        return _check(folder, digests)
    except OSError as cause:
        where = str(cause.filename or folder)
        raise CheckpointError(
            where, f"cannot be read: {cause.strerror}", "check its permissions and the disk"
        ) from cause


def _check(folder: Path, digests: bool | None) -> Checkpoint:
    config = read_config(folder)
    geometry = Geometry.from_dict(config)
    if config.get("quantization_config") is None:
        raise ConfigError(
            str(folder / "config.json"),
            "no quantization_config: the checkpoint is not quantized",
            "run `vqserve encode SRC DST` on it and use DST",
        )
    quant, specs = QuantConfig.from_dict(config["quantization_config"]), checkpoint_specs(config)
    if digests is None:
        digests = sum(record.size for record in read_manifest(folder).values()) < DIGEST_LIMIT
    files = check_manifest(folder, digests)
    tensors = _read_tensors(folder, files)
    _check_tensors(tensors, specs)
    _check_codebooks(tensors, quant)
    _check_zero_points(tensors, quant)
    return Checkpoint(folder, config, quant, geometry, files, specs, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """Reads `config.json` of a checkpoint, quantized or not.

    Raises:
        CheckpointError: There is no such folder, it holds no checkpoint, or the file is not a JSON object.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise CheckpointError(
            str(folder), f"expected a folder, found {found}", "give the path of a checkpoint's folder"
        )
    if not (folder / "config.json").is_file():
        problem = "not a checkpoint: it holds no config.json"
        raise CheckpointError(str(folder), problem, "give the folder that holds config.json and the safetensors files")
    return read_object(plain_file(folder, "config.json", "the checkpoint"), ConfigError)


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Where every tensor of a checkpoint is, quantized or not, from its index and its files' headers.

    Raises:
        CheckpointError: A file is missing or damaged, or index and headers disagree.
    """
    path = plain_file(folder, INDEX, "the checkpoint")
    weight_map = read_object(path, TensorError).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(file, str) for file in weight_map.values()):
        raise TensorError(f"{path}: weight_map", "expected an object of tensor names and file names", _REENCODE)
    tensors: dict[str, StoredTensor] = {}
    paths = {file: plain_file(folder, file, INDEX) for file in sorted(set(weight_map.values()))}
    for file, path in paths.items():
        for name, tensor in read_header(path).items():
            if weight_map.get(name) != file:
                says = weight_map.get(name, "nothing")
                problem = f"the file holds this tensor, but {INDEX} says {says}"
                raise TensorError(f"{path}: {name}", problem, _REENCODE)
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise TensorError(f"{folder / file}: {name}", f"{INDEX} says this file holds it; it does not", _REENCODE)
    return tensors


def _read_tensors(folder: Path, files: Mapping[str, FileRecord]) -> dict[str, StoredTensor]:
    for name in ("config.json", INDEX):
        if name not in files:
            raise CheckpointError(str(folder / "manifest.json"), f"does not name {name}", _REENCODE)
    tensors = read_tensors(folder)
    used = {tensor.path.name for tensor in tensors.values()}
    for name in files:
        if name.endswith(".safetensors") and name not in used:
            raise TensorError(str(folder / name), f"surplus: {INDEX} names no tensor of it", _REENCODE)
    return tensors


def _check_tensors(tensors: Mapping[str, StoredTensor], specs: Mapping[str, TensorSpec]) -> None:
    for name, spec in specs.items():
        if spec.required and name not in tensors:
            raise TensorError(name, f"missing: no file holds it, expected {_kind(spec.dtype, spec.shape)}", _REENCODE)
    for name, tensor in tensors.items():
        where = f"{tensor.path}: {name}"
        wanted = specs.get(name)
        if wanted is None:
            raise TensorError(where, "surplus: config.json calls for no such tensor", _REENCODE)
        if tensor.dtype not in (wanted.dtype, *wanted.other_dtypes) or tensor.shape != wanted.shape:
            found = _kind(tensor.dtype, tensor.shape)
            raise TensorError(where, f"expected {_kind(wanted.dtype, wanted.shape)}, found {found}", _REENCODE)


def _kind(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _check_codebooks(tensors: Mapping[str, StoredTensor], quant: QuantConfig) -> None:
    """Codebooks are finite, and those of a tier the same bytes in every layer."""
    first: dict[tuple[str, bool], StoredTensor] = {}
    for module in quant.modules:
        for tier in module.used_tiers():
            for refinement in (False, True) if tier.refinement_rows else (False,):
                tensor = tensors[codebook_name(module.name, tier.id, refinement)]
                other, data = first.setdefault((tier.id, refinement), tensor), tensor.read()
                if other is tensor:
                    _check_finite(tensor, data)
                elif data != other.read():
                    problem = f"expected the same codebook in every layer, found another than {other.name}"
                    raise TensorError(f"{tensor.path}: {tensor.name}", problem, _REENCODE)


def _check_finite(tensor: StoredTensor, data: bytes) -> None:
    for at, bits in enumerate(struct.unpack(f"<{len(data) // 2}H", data)):
        if bits & 0x7C00 == 0x7C00:
            row, column = divmod(at, tensor.shape[1])
            problem = f"expected finite fp16 values, found NaN or infinity at row {row}, column {column}"
            raise TensorError(f"{tensor.path}: {tensor.name}", problem, _REENCODE)


def _check_zero_points(tensors: Mapping[str, StoredTensor], quant: QuantConfig) -> None:
    for name in quant.spine.modules if quant.spine else ():
        tensor = tensors[f"{name}.qzeros"]
        if tensor.read() != b"\x77" * tensor.nbytes:
            raise TensorError(f"{tensor.path}: {tensor.name}", "expected 0x77777777 in every element", _REENCODE)
