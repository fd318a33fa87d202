"""The checkpoint to encode, and what tells it from others."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from vqserve.format.files import DIGEST_LIMIT
from vqserve.format.manifest import sha256_file
from vqserve.format.names import layer_of
from vqserve.model.weights import StoredModel

_SAMPLES, _SAMPLE_BYTES = 64, 2**16


class Parent(StoredModel):
    """A GLM-MoE-DSA checkpoint in bf16 or another float dtype. Weights stay on disk until a tensor is asked for."""

    def check_left_over(self) -> None:
        """Reads, one at a time, what no layer computes with: else it would be read for the first time hours later.

        These are the indexers, which do not run, and the tensors outside of layers.

        Raises:
            TensorError: One holds NaN or infinity.
        """
        layers = range(self.geometry.num_hidden_layers)
        for name in self.tensors:
            layer = layer_of(name)
            if layer is None or (layer in layers and ".self_attn.indexer." in name):
                self.tensor(name)

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
