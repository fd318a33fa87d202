from __future__ import annotations

import torch

from random_checkpoint import round_to_gptq
from vqserve.reference.gptq import dequantize_gptq


def test_packed_weights_dequantize_to_what_they_were_rounded_to(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(96, 384, generator=generator).bfloat16()
    parts, rounded = round_to_gptq(weight)
    assert torch.equal(dequantize_gptq(parts["qweight"], parts["scales"], torch.bfloat16), rounded)


def test_nibbles_run_along_the_inputs_lowest_first_and_eight_is_zero() -> None:
    word = sum((level + 8) << 4 * i for i, level in enumerate((-8, -1, 0, 1, 2, 3, 4, 7)))
    qweight = torch.full((16, 2), word - (1 << 32), dtype=torch.int64).to(torch.int32)
    scales = torch.tensor([[1.0, 0.5]], dtype=torch.bfloat16)
    weight = dequantize_gptq(qweight, scales)
    assert weight.shape == (2, 128)
    assert weight[0, :8].tolist() == [-8, -1, 0, 1, 2, 3, 4, 7]
    assert torch.equal(weight[1], weight[0] / 2)
