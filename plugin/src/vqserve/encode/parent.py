"""The checkpoint to encode: configuration, weights by name from safetensors files, and the tokenizer."""

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
from vqserve.reference.tensors import read_tensor

_DOWNLOAD = "download the parent checkpoint again, as its makers publish it"
_SAMPLES, _SAMPLE_BYTES = 64, 2**16


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
        tensor = read_tensor(stored)
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

    def expert_weights(self, layer: int, experts: Sequence[int], device: torch.device) -> dict[str, Tensor]:
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
        """Tells parents apart by their content: the configuration and the sha256 of each weight file.

        From 1 GiB in all, where reading everything would take minutes, and hours for 1.45 TB, the sha256 is that of a
        file's header and of `_SAMPLES` pieces spread over it, beside its size.
        """
        paths = sorted({stored.path for stored in self.tensors.values()})
        whole = sum(path.stat().st_size for path in paths) < DIGEST_LIMIT
        return {
            "config": self.config,
            "files": {path.name: sha256_file(path) if whole else _sample(path) for path in paths},
        }


def _sample(path: Path) -> list[int | str]:
    """Size of a safetensors file, and the sha256 of its header and of pieces from its first byte to its last."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = file.read(8)
        digest = hashlib.sha256(length + file.read(int.from_bytes(length, "little")))
        start = file.tell()
        for at in range(_SAMPLES):
            file.seek(start + max(0, size - start - _SAMPLE_BYTES) * at // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return [size, digest.hexdigest()]
