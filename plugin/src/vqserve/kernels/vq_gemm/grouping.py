"""Pairs of token and expert sorted by expert and cut into blocks, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def most_blocks(pairs: int, experts: int, tokens: int) -> int:
    """As many blocks of up to `tokens` pairs as there can be."""
    return min(pairs, pairs // tokens + experts)


@dataclass(frozen=True)
class Grouping:
    """Pairs sorted by expert and cut into blocks; shapes depend on shapes alone.

    Attributes:
        order: int32 [pairs], the pair at each position; those without an expert on this rank come last.
        expert: int32 [most blocks], the block's expert; -1 for a block that is not needed.
        first: int32 [most blocks], the block's first position.
        last: int32 [most blocks], the position behind the block's last one.
    """

    order: Tensor
    expert: Tensor
    first: Tensor
    last: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four, in this order."""
        return self.order, self.expert, self.first, self.last

    @classmethod
    def of(cls, topk_ids: Tensor, expert_map: Tensor | None, experts: int, tokens: int) -> Grouping:
        """Groups pairs into blocks of at most `tokens`; nothing waits for the device."""
        expert = topk_ids.flatten().long()
        if expert_map is not None:
            expert = torch.where(expert < 0, -1, expert_map.long()[expert.clamp(min=0)])
        ordered, order = torch.where(expert < 0, experts, expert).sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(experts + 1, device=expert.device))
        pairs = starts.diff()
        own = (pairs + tokens - 1) // tokens  # blocks of each expert
        ends = own.cumsum(0)
        block = torch.arange(most_blocks(len(order), experts, tokens), device=expert.device)
        of_block = torch.searchsorted(ends, block, right=True)
        known = of_block.clamp(max=experts - 1)
        share = (pairs + own - 1)[known] // own[known].clamp(min=1)
        first = starts[known] + (block - (ends - own)[known]) * share
        last = torch.minimum(first + share, starts[known + 1])
        return cls(order.int(), torch.where(of_block < experts, of_block, -1).int(), first.int(), last.int())
