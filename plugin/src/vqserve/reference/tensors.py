"""Stored tensors as torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve.format.headers import StoredTensor

DTYPES = {
    "U8": torch.uint8,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
"""By the names that safetensors headers use."""


def read_tensor(stored: StoredTensor) -> Tensor:
    """Reads one tensor, in its stored dtype, onto the CPU; nothing else of its file.

    Raises:
        TensorError: The file cannot be read, or has been cut since its header was checked.
    """
    data = bytearray(stored.read())
    flat = torch.frombuffer(data, dtype=DTYPES[stored.dtype]) if data else torch.empty(0, dtype=DTYPES[stored.dtype])
    return flat.view(stored.shape)
