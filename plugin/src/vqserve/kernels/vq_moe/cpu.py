"""The routed experts on a CPU: pairs grouped by expert, weights from tables instead of `dequantize`.

The look-up gives the same bits sooner: fp32 tables made once, 32-bit indices, and one look-up per byte of refinement (a
pair of codewords) instead of unpacked nibbles.

Measured on two idle AMD EPYC cores, torch 2.13.0: three layers, 16 experts, top-4, hidden and width 256, all tiers:
one token 2.1 ms (2.6 ms on one core), against 4.1 (5.5) with `dequantize`; 64 tokens 12 ms (14), against 20 (26).
Rejected: one look-up per tier for all of a call's experts, same bits, 2.5 ms (2.7) and 28 ms (38).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import silu

from vqserve.format.tiers import GROUP
from vqserve.reference.dequantize import Codebook
from vqserve.reference.moe import Experts


class TabledExperts(Experts):
    """Experts with the tables made from their codebooks.

    The tables are kept: make a new object when the codebooks' content changes.
    """

    @cached_property
    def _lookups(self) -> dict[str, _Lookup]:
        return {letter: _Lookup.of(codebook) for letter, codebook in self.codebooks.items()}

    def weight(self, expert: int, proj: str) -> Tensor:
        """The weights of a projection of local `expert`: fp32 [R, C], bit for bit what `dequantize` gives."""
        slot, planes = self.layout.slots[expert][proj], self.planes(expert, proj)
        lookup = self._lookups[slot.tier.id]
        words = lookup.base.index_select(0, planes["codes"].flatten().int()).view(-1, GROUP)
        if lookup.pairs is not None:
            words += lookup.pairs.index_select(0, planes["refinement"].flatten().int()).view(-1, GROUP)
        words *= planes["scales"].flatten().float()[:, None]
        if proj == "down_proj":
            return words.view(-1, slot.rows, GROUP).transpose(0, 1).reshape(slot.rows, slot.columns)
        return words.view(slot.rows, slot.columns)


@dataclass(frozen=True)
class _Lookup:
    """A codebook as tables that bytes index.

    Attributes:
        base: fp32 [256, d].
        pairs: fp32 [256, 2d], the two refinement codewords that a byte's nibbles stand for; None without refinement.
    """

    base: Tensor
    pairs: Tensor | None

    @classmethod
    def of(cls, codebook: Codebook) -> _Lookup:
        if codebook.refinement is None:
            return cls(codebook.base.float(), None)
        byte, words = torch.arange(256, device=codebook.base.device), codebook.refinement.float()
        return cls(codebook.base.float(), torch.cat((words[byte & 15], words[byte >> 4]), dim=1))


def moe(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: TabledExperts, expert_map: Tensor | None = None
) -> Tensor:
    """Sum over the routed experts of each token, weighted, as `vqserve.reference.moe` defines it; computed in fp32.

    Args:
        x: [T, H], any float dtype.
        topk_weights: [T, k], the router's weights.
        topk_ids: Integer [T, k], global expert ids; -1 is skipped.
        experts: This rank's experts.
        expert_map: Integer [global experts], local id or -1 for an expert on another rank; None if all are local.

    Returns:
        [T, H] in x's dtype: this rank's part of the sum, not reduced over ranks.
    """
    local = topk_ids.long()
    if expert_map is not None:
        local = torch.where(local < 0, local, expert_map.long()[local])
    inputs, out = x.float(), torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted({expert for expert in local.flatten().tolist() if expert >= 0}):
        token, choice = (local == expert).nonzero(as_tuple=True)
        rows = inputs[token]
        gate, up = rows @ experts.weight(expert, "gate_proj").t(), rows @ experts.weight(expert, "up_proj").t()
        down = (silu(gate) * up) @ experts.weight(expert, "down_proj").t()
        out.index_add_(0, token, down * topk_weights[token, choice, None].float())
    return out.to(x.dtype)
