"""What the format says about values: codebooks, zero points, and that no scale is NaN or infinite."""

from __future__ import annotations

from collections.abc import Mapping

from vqserve.format.config import QuantConfig
from vqserve.format.errors import TensorError
from vqserve.format.headers import StoredTensor
from vqserve.format.manifest import Report, refuse
from vqserve.format.names import codebook_name

FULL_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}
"""Per float dtype the bits of the exponent: NaN and infinities are the patterns that have all of them set."""

_REENCODE = "restore the checkpoint from where it came from, or encode it again"
# For the upper byte: of an fp16 it holds all of the exponent, of a bf16 all but the last bit.
_IS_FULL = {
    "F16": bytes(byte & 0x7C == 0x7C for byte in range(256)),
    "BF16": bytes(byte & 0x7F == 0x7F for byte in range(256)),
}


def not_finite(tensor: StoredTensor, at: int) -> TensorError:
    """The error for a NaN or infinity in element `at` of a tensor's data."""
    place: list[int] = []
    for axis in reversed(tensor.shape):
        at, index = divmod(at, axis)
        place.insert(0, index)
    problem = f"expected finite values, found NaN or infinity at {place}"
    return TensorError(f"{tensor.path}: {tensor.name}", problem, _REENCODE)


def check_halves(tensor: StoredTensor, data: bytes, report: Report = refuse) -> None:
    """Checks that the F16 or BF16 values of a tensor are finite, with the standard library at some GB/s.

    Raises:
        TensorError: With `refuse`: one is not.
    """
    upper = data[1::2].translate(_IS_FULL[tensor.dtype])
    at = upper.find(1)
    while at >= 0 and tensor.dtype == "BF16" and not data[2 * at] & 0x80:
        at = upper.find(1, at + 1)
    if at >= 0:
        report(not_finite(tensor, at))


def check_scales(tensors: Mapping[str, StoredTensor]) -> None:
    """Checks that the scales of the routed experts and of the 4-bit layers are finite.

    Raises:
        TensorError: The first that is not.
    """
    for tensor in tensors.values():
        if tensor.name.endswith(".scales"):
            check_halves(tensor, tensor.read())


def check_codebooks(tensors: Mapping[str, StoredTensor], quant: QuantConfig, report: Report = refuse) -> None:
    """Checks that codebooks are finite, and those of a tier the same bytes in every layer.

    Raises:
        TensorError: With `refuse`: one is not.
    """
    first: dict[tuple[str, bool], StoredTensor] = {}
    for module in quant.modules:
        for tier in module.used_tiers():
            for refinement in (False, True) if tier.refinement_rows else (False,):
                tensor = tensors[codebook_name(module.name, tier.id, refinement)]
                other, data = first.setdefault((tier.id, refinement), tensor), tensor.read()
                if other is tensor:
                    check_halves(tensor, data, report)
                elif data != other.read():
                    problem = f"expected the same codebook in every layer, found another than {other.name}"
                    report(TensorError(f"{tensor.path}: {tensor.name}", problem, _REENCODE))


def check_zero_points(tensors: Mapping[str, StoredTensor], quant: QuantConfig, report: Report = refuse) -> None:
    """Checks that the 4-bit layers are symmetric.

    Raises:
        TensorError: With `refuse`: one is not.
    """
    for name in quant.spine.modules if quant.spine else ():
        tensor = tensors[f"{name}.qzeros"]
        if tensor.read() != b"\x77" * tensor.nbytes:
            problem = "expected 0x77777777 in every element"
            report(TensorError(f"{tensor.path}: {tensor.name}", problem, _REENCODE))
