"""Everything about a checkpoint that is checked before it is served, mostly without reading the weights.

What is read here is JSON and safetensors; nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqserve.format.companions import check_companions
from vqserve.format.config import QuantConfig
from vqserve.format.errors import CheckpointError, ConfigError, ManifestError, TensorError
from vqserve.format.geometry import Geometry
from vqserve.format.headers import StoredTensor, read_header
from vqserve.format.layout import TensorSpec, checkpoint_specs, float_dtype, parent_specs
from vqserve.format.manifest import FileRecord, Report, check_manifest, plain_file, read_manifest, refuse
from vqserve.format.names import expert_tensor
from vqserve.format.strict_json import LFS_REMEDY, POINTER_FOUND, is_pointer, read_object
from vqserve.format.values import check_codebooks, check_scales, check_zero_points
from vqserve.format.variants import completed

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "known_answers.json",
    "LICENSE",
)
"""Files beside the weights that a checkpoint may have; an encode copies its parent's."""
DIGEST_LIMIT = 1 << 30
"""Checkpoints below this many bytes are read whole by `vqserve serve`, for their sha256: it takes about a second."""

_FUSED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
_LEFT_OVER = ".rotary_emb.inv_freq"
"""Buffer that older exports hold; it follows from the configuration."""
_DOWNLOAD = "download the parent checkpoint again, as its makers publish it"
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


@dataclass(frozen=True)
class ParentCheckpoint:
    """An unquantized checkpoint whose headers have been checked.

    Attributes:
        path: Its folder.
        config: The parsed `config.json`, completed by what transformers' class implies (see `format.variants`).
        geometry: The model's sizes.
        tensors: Where every tensor is, by name; of experts that are stored fused, where each one's part is.
        fused: Whether experts are stored so, as transformers 5 does if told to keep its own layout.
    """

    path: Path
    config: Mapping[str, Any]
    geometry: Geometry
    tensors: Mapping[str, StoredTensor]
    fused: bool


def check_parent(folder: Path) -> ParentCheckpoint:
    """Checks configuration and headers of an unquantized checkpoint: every tensor's name, dtype and shape.

    Raises:
        CheckpointError: There is no checkpoint, or it is quantized already, damaged, incomplete, or holds a tensor that
            this architecture has no place for.
    """
    with readable(folder):
        config = read_config(folder)
        if config.get("quantization_config") is not None:
            where = f"{folder / 'config.json'}: quantization_config"
            raise ConfigError(where, "the checkpoint is quantized already", "give the unquantized parent")
        for name in COMPANIONS:
            if (folder / name).is_file() and is_pointer(folder / name):
                raise CheckpointError(str(folder / name), POINTER_FOUND, LFS_REMEDY)
        config = completed(config)
        geometry = Geometry.from_dict(config)
        stored = read_tensors(folder) if (folder / INDEX).is_file() else read_single(folder)
        tensors = _apart((found for found in stored.values() if not found.name.endswith(_LEFT_OVER)), geometry)
        check_tensors(tensors, parent_specs(geometry, float_dtype(config)), remedy=_DOWNLOAD)
    fused = any(tensor.name.endswith(_FUSED) for tensor in stored.values())
    return ParentCheckpoint(folder, config, geometry, tensors, fused)


def read_single(folder: Path) -> dict[str, StoredTensor]:
    """Where every tensor of an unquantized checkpoint without an index is: in its one file.

    Raises:
        CheckpointError: There is no such file, or it is damaged.
    """
    found = len(list(folder.glob("*.safetensors")))
    if found and not (folder / SINGLE).exists():
        problem = f"is missing: expected it beside {found} safetensors files that are not called {SINGLE}"
        raise ManifestError(str(folder / INDEX), problem, _DOWNLOAD)
    return read_header(plain_file(folder, SINGLE, f"a checkpoint without {INDEX}", links=True))


def _apart(stored: Iterable[StoredTensor], geometry: Geometry) -> dict[str, StoredTensor]:
    """Where every tensor is, by name, experts apart.

    Raises:
        TensorError: Experts are stored both fused and apart, or fused in another shape than the configuration's.
    """
    tensors: dict[str, StoredTensor] = {}
    holders: dict[str, StoredTensor] = {}
    for tensor in stored:
        for part in unfused(tensor, geometry):
            other = holders.setdefault(part.name, tensor)
            if other is not tensor:
                problem = f"expected experts fused or apart, found both: {other.path}: {other.name} holds the same"
                raise TensorError(f"{tensor.path}: {tensor.name}", problem, _DOWNLOAD)
            tensors[part.name] = part
    return tensors


def unfused(tensor: StoredTensor, geometry: Geometry) -> Iterator[StoredTensor]:
    """The projections of a layer's experts, if a tensor is all of them on top of each other, else the tensor itself.

    Raises:
        TensorError: It is all of them by its name, but not by its shape.
    """
    module, _, leaf = tensor.name.rpartition(".")
    inner, hidden = geometry.moe_intermediate_size, geometry.hidden_size
    whole = {
        "gate_up_proj": (geometry.n_routed_experts, 2 * inner, hidden),
        "down_proj": (geometry.n_routed_experts, hidden, inner),
    }
    if not tensor.name.endswith(_FUSED):
        yield tensor
        return
    if tensor.shape != whole[leaf]:
        problem = f"expected {_kind(tensor.dtype, whole[leaf])}, found {_kind(tensor.dtype, tensor.shape)}"
        raise TensorError(f"{tensor.path}: {tensor.name}", problem, _DOWNLOAD)
    projections = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
    nbytes = tensor.nbytes // geometry.n_routed_experts // len(projections)
    for expert in range(geometry.n_routed_experts):
        for at, proj in enumerate(projections):
            name = expert_tensor(module, expert, proj, "weight")
            offset = tensor.offset + (expert * len(projections) + at) * nbytes
            yield StoredTensor(name, tensor.dtype, geometry.expert_shape(proj), tensor.path, offset, nbytes)


def check_checkpoint(folder: Path, digests: bool | None = None) -> Checkpoint:
    """Checks configuration, manifest, file sizes, headers, every tensor's name, dtype and shape, and the codebooks.

    Args:
        folder: The checkpoint.
        digests: Whether to read every file whole, to check its sha256 and all scales; None means if all files
            together are below 1 GiB.

    Raises:
        CheckpointError: The first thing that is wrong, with file, tensor, expectation and remedy.
    """
    with readable(folder):
        return _check(folder, digests)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what reading `path` may fail with into an error that a person can act on.

    Raises:
        CheckpointError: The file or a file of the folder cannot be read, or is nested too deeply to be looked at.
    """
    try:
        yield
    except OSError as cause:
        problem = f"cannot be read: {cause.strerror}"
        raise CheckpointError(str(cause.filename or path), problem, "check its permissions and the disk") from cause
    except RecursionError as cause:  # what the JSON parser just took, an error message or a comparison may not
        raise CheckpointError(str(path), "expected plain JSON, found it nested too deeply", _REENCODE) from cause


@contextmanager
def called(path: Path) -> Iterator[None]:
    """Has what is refused of a configuration that lies alone, whatever its name, say that name.

    Raises:
        ConfigError: As in the block.
    """
    try:
        yield
    except ConfigError as cause:
        file, colon, key = cause.where.partition(": ")
        if path.is_dir() or Path(file).name != "config.json":
            raise
        raise ConfigError(f"{path}{colon}{key}", cause.problem, cause.remedy) from cause


def _check(folder: Path, digests: bool | None) -> Checkpoint:
    config = read_config(folder, links=False)
    geometry, quant, specs = described(folder, config)
    if digests is None:
        digests = sum(record.size for record in read_manifest(folder).values()) < DIGEST_LIMIT
    files = check_manifest(folder, digests)
    check_companions(folder, files, config, geometry.vocab_size)
    tensors = read_tensors(folder, links=False)
    check_used(folder, files, tensors)
    check_tensors(tensors, specs)
    check_codebooks(tensors, quant)
    check_zero_points(tensors, quant)
    if digests:
        check_scales(tensors)
    return Checkpoint(folder, config, quant, geometry, files, specs, tensors)


def described(folder: Path, config: Mapping[str, Any]) -> tuple[Geometry, QuantConfig, dict[str, TensorSpec]]:
    """What the `config.json` of a vqserve checkpoint says: the model's sizes, how it is stored, and in which tensors.

    Raises:
        ConfigError: It is that of an unquantized checkpoint, or not valid.
    """
    geometry = Geometry.from_dict(config)
    if config.get("quantization_config") is None:
        raise ConfigError(
            str(folder / "config.json"),
            "no quantization_config: the checkpoint is not quantized",
            "run `vqserve encode SRC DST` on it and use DST; `vqserve serve --bf16` serves it as it is",
        )
    return geometry, QuantConfig.from_dict(config["quantization_config"]), checkpoint_specs(config)


def check_folder(folder: Path) -> None:
    """Checks that a path is a folder with a `config.json`.

    Raises:
        CheckpointError: It is not.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise CheckpointError(
            str(folder), f"expected a folder, found {found}", "give the path of a checkpoint's folder"
        )
    if not (folder / "config.json").is_file():
        problem = "not a checkpoint: it holds no config.json"
        raise CheckpointError(str(folder), problem, "give the folder that holds config.json and the safetensors files")


def read_config(folder: Path, *, links: bool = True) -> dict[str, Any]:
    """Reads `config.json` of a checkpoint, quantized or not.

    Args:
        folder: The checkpoint.
        links: Whether the file may be a link out of the folder: a parent's may, a vqserve checkpoint's must not.

    Raises:
        CheckpointError: There is no such folder, it holds no checkpoint, or the file is not a JSON object.
    """
    check_folder(folder)
    return read_object(plain_file(folder, "config.json", "the checkpoint", links=links), ConfigError)


def read_tensors(folder: Path, *, links: bool = True, report: Report = refuse) -> dict[str, StoredTensor]:
    """Where every tensor of a checkpoint is, quantized or not, from its index and its files' headers.

    Args:
        folder: The checkpoint.
        links: Whether files may be links out of the folder: a parent's may, a vqserve checkpoint's must not.
        report: What is done with a file or tensor that is wrong; those are then left out of the result.

    Raises:
        CheckpointError: The index is not valid; with `refuse` also if a file is missing or damaged, or index and
            headers disagree.
    """
    path = plain_file(folder, INDEX, "the checkpoint", links=links)
    weight_map = read_object(path, TensorError).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(file, str) for file in weight_map.values()):
        raise TensorError(f"{path}: weight_map", "expected an object of tensor names and file names", _REENCODE)
    tensors: dict[str, StoredTensor] = {}
    headers: dict[str, dict[str, StoredTensor]] = {}
    for file in sorted(set(weight_map.values())):
        try:
            headers[file] = read_header(plain_file(folder, file, INDEX, links=links))
        except CheckpointError as damage:
            report(damage)
    for file, header in headers.items():
        for name, tensor in header.items():
            if weight_map.get(name) == file:
                tensors[name] = tensor
            else:
                problem = f"the file holds this tensor, but {INDEX} says {weight_map.get(name, 'nothing')}"
                report(TensorError(f"{tensor.path}: {name}", problem, _REENCODE))
    for name, file in weight_map.items():
        if file in headers and name not in tensors:
            problem = f"{INDEX} says this file holds it; it does not"
            report(TensorError(f"{folder / file}: {name}", problem, _REENCODE))
    return tensors


def check_used(
    folder: Path, files: Iterable[str], tensors: Mapping[str, StoredTensor], report: Report = refuse
) -> None:
    """Checks that no safetensors file is left over.

    Raises:
        TensorError: With `refuse`: no tensor is read from one of `files`.
    """
    used = {tensor.path.name for tensor in tensors.values()}
    for name in files:
        if name.endswith(".safetensors") and name not in used:
            report(TensorError(str(folder / name), f"surplus: {INDEX} names no tensor of it", _REENCODE))


def check_tensors(
    tensors: Mapping[str, StoredTensor],
    specs: Mapping[str, TensorSpec],
    *,
    remedy: str = _REENCODE,
    report: Report = refuse,
) -> None:
    """Checks that the tensors are those called for: none missing, none surplus, each of its dtype and shape.

    Args:
        tensors: What a checkpoint holds, by name.
        specs: What it must hold, by name.
        remedy: What the reader of the error can do.
        report: What is done with one that is not.

    Raises:
        TensorError: With `refuse`: the first one that is not.
    """
    for name, spec in specs.items():
        if spec.required and name not in tensors:
            problem = f"missing: no file holds it, expected {_kind(spec.dtype, spec.shape)}"
            report(TensorError(name, problem, remedy))
    for name, tensor in tensors.items():
        where = f"{tensor.path}: {name}"
        wanted = specs.get(name)
        if wanted is None:
            report(TensorError(where, "surplus: config.json calls for no such tensor", remedy))
        elif tensor.dtype not in (wanted.dtype, *wanted.other_dtypes) or tensor.shape != wanted.shape:
            found = _kind(tensor.dtype, tensor.shape)
            report(TensorError(where, f"expected {_kind(wanted.dtype, wanted.shape)}, found {found}", remedy))


def _kind(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"
