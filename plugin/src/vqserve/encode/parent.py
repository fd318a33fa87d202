"""The checkpoint to encode: configuration, weights by name from sharded safetensors, and the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vqserve.format.config import PROJECTIONS
from vqserve.format.errors import CheckpointError, ConfigError, TensorError
from vqserve.format.files import read_config, read_tensors
from vqserve.format.geometry import Geometry
from vqserve.format.layout import float_dtype, parent_specs
from vqserve.format.names import expert_tensor, experts_module

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_DOWNLOAD = "download the parent checkpoint again"


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
            CheckpointError: There is no checkpoint, or it is quantized already, incomplete or damaged.
        """
        self.folder = folder
        self.config = read_config(folder)
        if self.config.get("quantization_config") is not None:
            where = f"{folder / 'config.json'}: quantization_config"
            raise ConfigError(where, "the checkpoint is quantized already", "give the unquantized parent")
        self.geometry = Geometry.from_dict(self.config)
        self.tensors = read_tensors(folder)
        for spec in parent_specs(self.geometry, float_dtype(self.config)).values():
            found = self.tensors.get(spec.name)
            if found is None and spec.required:
                raise TensorError(f"{folder}: {spec.name}", "missing", _DOWNLOAD)
            if found is not None and (found.shape != spec.shape or found.dtype not in (spec.dtype, *spec.other_dtypes)):
                problem = f"expected {spec.dtype}{list(spec.shape)}, found {found.dtype}{list(found.shape)}"
                raise TensorError(f"{found.path}: {spec.name}", problem, _DOWNLOAD)

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor, in its stored dtype, onto the CPU."""
        stored = self.tensors[name]
        return torch.frombuffer(bytearray(stored.read()), dtype=_DTYPES[stored.dtype]).view(stored.shape)

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

    def experts(self, layer: int, experts: range, device: torch.device) -> dict[str, Tensor]:
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
        """Tells parents apart without reading 1.45 TB: the configuration, and size and time of each weight file."""
        stats = {path.name: path.stat() for path in {stored.path for stored in self.tensors.values()}}
        return {
            "config": self.config,
            "files": {name: [stats[name].st_size, stats[name].st_mtime_ns] for name in sorted(stats)},
        }
