"""Checks of what has reached a layer. vLLM keeps no record of it for quantized models."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vqserve.format.errors import TensorError
from vqserve.format.layout import TensorSpec

_DTYPES = {"U8": torch.uint8, "F16": torch.float16}
_REMEDY = "copy the checkpoint again, or re-encode the parent"


class LoadRecord:
    """Has each of a layer's tensors arrive exactly once, in the stored shape and dtype.

    Args:
        layer: The layer's name, for messages.
        specs: The tensors that this rank needs, in their stored (unsharded) shape.
    """

    def __init__(self, layer: str, specs: Iterable[TensorSpec]) -> None:
        self._layer = layer
        self._specs = {spec.name: spec for spec in specs}
        self._arrived: set[str] = set()

    @property
    def empty(self) -> bool:
        return not self._arrived

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Checks that `tensor` is one of the layer's.

        Raises:
            TensorError: The layer has no such tensor, or needs another shape or dtype.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise TensorError(name, f"{self._layer} has no such tensor", _REMEDY)
        if tuple(tensor.shape) != spec.shape or tensor.dtype != _DTYPES[spec.dtype]:
            expected = f"{_DTYPES[spec.dtype]}{list(spec.shape)}"
            raise TensorError(name, f"expected {expected}, found {tensor.dtype}{list(tensor.shape)}", _REMEDY)

    def note(self, name: str) -> None:
        """Notes that a tensor has arrived.

        Raises:
            TensorError: It had already.
        """
        if name in self._arrived:
            raise TensorError(name, "loaded twice", _REMEDY)
        self._arrived.add(name)

    def close(self) -> None:
        """Ends one load, so that the next may bring every tensor again.

        Raises:
            TensorError: A tensor has not arrived.
        """
        missing = [name for name in self._specs if name not in self._arrived]
        self._arrived.clear()
        if missing:
            problem = f"missing, as are {len(missing) - 1} other tensors of {self._layer}"
            raise TensorError(missing[0], problem if missing[1:] else "missing", _REMEDY)


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Checks that no float is NaN or infinite.

    Args:
        tensors: Float tensors, each with its name for the error.

    Raises:
        TensorError: The first that holds one.
    """
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            raise TensorError(name, "expected finite values, found NaN or infinity", _REMEDY)
