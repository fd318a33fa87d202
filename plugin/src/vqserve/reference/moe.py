"""The routed experts of one layer, by definition: what every kernel is judged against.

`Experts` holds a rank's experts in flat buffers (see `format.flat`); `moe` applies them one pair of token and expert
after the other, in fp64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from vqserve.format.config import PROJECTIONS
from vqserve.format.flat import FlatLayout, buffer_name
from vqserve.reference.dequantize import Codebook, dequantize


@dataclass(frozen=True)
class Experts:
    """The experts of one layer that live on this rank.

    Attributes:
        layout: Where each plane lies in the buffers.
        buffers: The six flat buffers by name: codes and refinements uint8, scales fp16.
        codebooks: Tier id to codebook, for at least the tiers that the layout uses.
    """

    layout: FlatLayout
    buffers: Mapping[str, Tensor]
    codebooks: Mapping[str, Codebook]

    def planes(self, expert: int, proj: str) -> dict[str, Tensor]:
        """The stored planes of a projection of local `expert`: views of the buffers."""
        slot = self.layout.slots[expert][proj]
        planes = {}
        for part in slot.parts:
            offset, length = slot.span(part)
            planes[part] = self.buffers[buffer_name(proj, part)].narrow(0, offset, length).view(slot.shape(part))
        return planes

    def weight(self, expert: int, proj: str) -> Tensor:
        """The weights of a projection of local `expert`: fp32 [R, C]."""
        codebook = self.codebooks[self.layout.slots[expert][proj].tier.id]
        return dequantize(self.planes(expert, proj), codebook, proj)


def moe(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: Experts, expert_map: Tensor | None = None
) -> Tensor:
    """Sum over the routed experts of each token, weighted; computed in fp64.

    Args:
        x: [T, H], any float dtype.
        topk_weights: [T, k], the router's weights.
        topk_ids: Integer [T, k], global expert ids; -1 is skipped.
        experts: This rank's experts.
        expert_map: Integer [global experts], local id or -1 for an expert on another rank; None if all are local.

    Returns:
        [T, H] in x's dtype: this rank's part of the sum, not reduced over ranks.
    """
    inputs, out = x.double(), torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    here = None if expert_map is None else expert_map.tolist()
    weights: dict[int, list[Tensor]] = {}
    for token, (shares, chosen) in enumerate(zip(topk_weights.tolist(), topk_ids.tolist(), strict=True)):
        for share, choice in zip(shares, chosen, strict=True):
            expert = choice if here is None or choice < 0 else here[choice]
            if expert < 0:
                continue
            if expert not in weights:
                weights[expert] = [experts.weight(expert, proj).double() for proj in PROJECTIONS]
            gate, up, down = weights[expert]
            row = inputs[token]
            out[token] += share * (down @ (silu(gate @ row) * (up @ row)))
    return out.to(x.dtype)
