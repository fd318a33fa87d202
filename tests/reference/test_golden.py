"""The bytes of format version 1, pinned by files that were computed without this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from random_checkpoint import round_to_gptq
from vqserve.format.layout import plane_shape
from vqserve.format.tiers import TIERS
from vqserve.reference.dequantize import Codebook, dequantize
from vqserve.reference.pack import pack, pack_scales, unpack, unpack_scales

GOLDEN = Path(__file__).parent.parent / "golden/format-1"
CASES = [f"tier-{letter}-{proj}" for letter in TIERS for proj in ("up_proj", "down_proj")]


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return content


def _tensor(hexadecimal: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(hexadecimal), dtype=dtype).view(shape)


def _codes(digits: str, width: int, rows: int) -> Tensor:
    return torch.tensor([int(digits[at : at + width], 16) for at in range(0, len(digits), width)]).view(rows, -1)


def _planes(golden: dict[str, Any]) -> dict[str, Tensor]:
    tier, proj = TIERS[golden["tier"]], golden["projection"]
    parts = {"codes": torch.uint8, "refinement": torch.uint8, "scales": torch.float16}
    return {
        part: _tensor(golden[part], dtype, plane_shape(tier, proj, part, golden["rows"], golden["columns"]))
        for part, dtype in parts.items()
        if golden[part] is not None
    }


def _codebook(golden: dict[str, Any]) -> Codebook:
    tier = TIERS[golden["tier"]]
    base = _tensor(golden["codebook"], torch.float16, (256, tier.d))
    if golden["codebook_refinement"] is None:
        return Codebook(tier, base)
    return Codebook(tier, base, _tensor(golden["codebook_refinement"], torch.float16, (16, tier.d)))


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_are_packed_to_the_golden_bytes_and_back(case: str) -> None:
    golden = _read(case)
    tier, proj, rows, planes = TIERS[golden["tier"]], golden["projection"], golden["rows"], _planes(golden)
    base = _codes(golden["base_codes"], 2, rows)
    refinement = None if golden["refinement_codes"] is None else _codes(golden["refinement_codes"], 1, rows)
    packed = pack(base, refinement, tier, proj)
    assert set(packed) == set(planes) - {"scales"}
    for part, tensor in packed.items():
        assert tensor.is_contiguous()
        assert tensor.shape == planes[part].shape
        assert tensor.numpy().tobytes().hex() == golden[part]
    again, refined = unpack(planes, tier, proj)
    assert torch.equal(again, base)
    assert refined is None if refinement is None else refined is not None and torch.equal(refined, refinement)
    scales = pack_scales(unpack_scales(planes["scales"], proj), proj)
    assert scales.is_contiguous()
    assert scales.numpy().tobytes().hex() == golden["scales"]


@pytest.mark.parametrize("case", CASES)
def test_planes_are_dequantized_to_the_golden_weights_bit_for_bit(case: str) -> None:
    golden = _read(case)
    weights = dequantize(_planes(golden), _codebook(golden), golden["projection"])
    assert weights.shape == (golden["rows"], golden["columns"])
    assert weights.numpy().tobytes().hex() == golden["weights"]


def test_a_sum_in_another_order_would_not_pass() -> None:
    golden = _read("tier-d-up_proj")
    planes, codebook = _planes(golden), _codebook(golden)
    assert codebook.refinement is not None
    nothing = Codebook(codebook.tier, torch.zeros_like(codebook.base), codebook.refinement)
    unrefined = Codebook(codebook.tier, codebook.base, torch.zeros_like(codebook.refinement))
    scaled_first = dequantize(planes, unrefined, "up_proj") + dequantize(planes, nothing, "up_proj")
    assert scaled_first.numpy().tobytes().hex() != golden["weights"]


def test_the_spine_s_tensors_are_the_golden_bytes() -> None:
    golden = _read("spine")
    rows, columns = golden["rows"], golden["columns"]
    codes = _codes(golden["codes"], 1, rows).float() - 8
    weight = codes * torch.tensor(golden["row_scales"])[:, None]
    packed, rounded = round_to_gptq(weight)
    assert torch.equal(rounded, weight)
    assert packed["qweight"].shape == (columns // 8, rows)
    assert {part: tensor.view(torch.uint8).numpy().tobytes().hex() for part, tensor in packed.items()} == {
        part: golden[part] for part in ("qweight", "scales", "qzeros")
    }
