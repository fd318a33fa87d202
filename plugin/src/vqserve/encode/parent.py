"""The checkpoint to encode: configuration, weights by name from sharded safetensors, and the tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vqserve.format.config import PROJECTIONS
from vqserve.format.errors import CheckpointError, TensorError
from vqserve.format.files import DIGEST_LIMIT, check_parent
from vqserve.format.manifest import sha256_file
from vqserve.format.names import expert_tensor, experts_module

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_DOWNLOAD = "download the parent checkpoint again, as its makers publish it"
_SAMPLE_BYTES = 2**20


class Parent:
    """A GLM-MoE-DSA checkpoint in bf16 or another float dtype. Weights stay on disk until a tensor is asked for.

    Attributes:
        folder: Where it lies.
        config: Its `config.json`, parsed.
        geometry: The model's sizes.
        tensors: Where each tensor is, by name.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the checkpoint; compares names, shapes and dtypes with what its configuration calls for.

        Raises:
            CheckpointError: There is no checkpoint, or it is quantized already, damaged, incomplete, or holds a tensor
                that this architecture has no place for.
        """
        checked = check_parent(folder)
        self.folder, self.config = folder, dict(checked.config)
        self.geometry, self.tensors = checked.geometry, checked.tensors

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor, in its stored dtype, onto the CPU.

        Raises:
            TensorError: It holds NaN or infinity.
        """
        stored = self.tensors[name]
        tensor = torch.frombuffer(bytearray(stored.read()), dtype=_DTYPES[stored.dtype]).view(stored.shape)
        if not tensor.isfinite().all():
            place = (~tensor.isfinite()).nonzero()[0].tolist()
            problem = f"expected finite values, found {tensor[tuple(place)].item()} at {place}"
            raise TensorError(f"{stored.path}: {name}", problem, _DOWNLOAD)
        return tensor

    def layer(self, layer: int) -> dict[str, Tensor]:
        """All tensors of a layer but those of routed experts and indexer, by name without `model.layers.N.`."""
        stem = f"model.layers.{layer}."
        left_out = (f"{experts_module(layer)}.", f"{stem}self_attn.indexer.")
        names = [name for name in self.tensors if name.startswith(stem) and not name.startswith(left_out)]
        return {name.removeprefix(stem): self.tensor(name) for name in names}

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The three projections of a routed expert, `[R, C]` each."""
        module = experts_module(layer)
        return {proj: self.tensor(expert_tensor(module, expert, proj, "weight")) for proj in PROJECTIONS}

    def experts(self, layer: int, experts: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The three projections of several routed experts: float32 `[B, R, C]` on a device."""
        found = [self.expert(layer, expert) for expert in experts]
        return {proj: torch.stack([expert[proj] for expert in found]).to(device, torch.float32) for proj in PROJECTIONS}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's own tokenizer with its chat template.

        Raises:
            CheckpointError: There is none, or it cannot be read.
        """
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{self.folder}", f"the tokenizer cannot be read ({reason})", _DOWNLOAD) from error
        return tokenizer

    def fingerprint(self) -> dict[str, Any]:
        """Tells parents apart: the configuration and the sha256 of each weight file.

        From 1 GiB in all, where reading everything would take minutes, and hours for 1.45 TB, each file stands for
        itself by size, time, and the sha256 of its header, the first and the last MiB of its data.
        """
        paths = sorted({stored.path for stored in self.tensors.values()})
        whole = sum(path.stat().st_size for path in paths) < DIGEST_LIMIT
        return {
            "config": self.config,
            "files": {path.name: sha256_file(path) if whole else _sample(path) for path in paths},
        }


def _sample(path: Path) -> list[int | str]:
    """Size and time of a safetensors file, and the sha256 of its header, the first and the last MiB of its data."""
    stat = path.stat()
    with path.open("rb") as file:
        length = file.read(8)
        digest = hashlib.sha256(length + file.read(int.from_bytes(length, "little") + _SAMPLE_BYTES))
        file.seek(max(file.tell(), stat.st_size - _SAMPLE_BYTES))
        digest.update(file.read())
    return [stat.st_size, stat.st_mtime_ns, digest.hexdigest()]
