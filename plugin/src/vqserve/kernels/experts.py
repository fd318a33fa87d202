"""The experts of one layer as the kernels take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vqserve.format.config import PROJECTIONS
from vqserve.format.flat import BUFFERS, FlatLayout
from vqserve.format.tiers import TIERS
from vqserve.kernels.repack.order import repack
from vqserve.reference.dequantize import Codebook
from vqserve.reference.moe import Experts

UNIT = 64
"""Bytes that every plane's place is a multiple of."""


@dataclass(frozen=True)
class KernelExperts:
    """The experts of one layer that live on this rank, in the kernels' order.

    Attributes:
        buffers: The six flat buffers in the order of `format.flat.BUFFERS`: codes and refinements uint8, scales fp16.
        places: From `places`.
        codebooks: From `codeword_table`.
        hidden: Inputs and outputs of an expert.
        width: Rows of gate and up on this rank.
    """

    buffers: tuple[Tensor, ...]
    places: Tensor
    codebooks: Tensor
    hidden: int
    width: int

    @property
    def planes(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Codes, refinements and scales of gate and up, then of down."""
        return self.buffers[:3], self.buffers[3:]

    @classmethod
    def of(cls, experts: Experts) -> KernelExperts:
        """A copy of experts in the checkpoint's order."""
        experts = replace(experts, buffers={name: buffer.clone() for name, buffer in experts.buffers.items()})
        repack(experts)
        device = experts.buffers[BUFFERS[0]].device
        down = experts.layout.slots[0]["down_proj"]
        return cls(
            tuple(experts.buffers[name] for name in BUFFERS),
            places(experts.layout, device),
            codeword_table(experts.codebooks, device),
            down.rows,
            down.columns,
        )


def places(layout: FlatLayout, device: torch.device) -> Tensor:
    """int32 [experts, gate | up | down, 4]: tier (index of `TIERS`), then where codes, refinements and scales begin.

    Places are in units of `UNIT` bytes.
    """
    letters = list(TIERS)
    rows = [
        [
            [letters.index(slot.tier.id), slot.codes // UNIT, slot.refinement // UNIT, 2 * slot.scales // UNIT]
            for slot in (row[proj] for proj in PROJECTIONS)
        ]
        for row in layout.slots
    ]
    return torch.tensor(rows, dtype=torch.int32).to(device)


def codeword_table(codebooks: Mapping[str, Codebook], device: torch.device) -> Tensor:
    """fp16 [6336]: the codewords of tiers a to d, each base before its refinement; zeros for tiers left out."""
    parts = []
    for letter, tier in TIERS.items():
        book = codebooks.get(letter)
        if book is None:
            size = (tier.base_rows + tier.refinement_rows) * tier.d
            parts.append(torch.zeros(size, dtype=torch.float16, device=device))
        else:
            parts += [words.flatten().to(device) for words in (book.base, book.refinement) if words is not None]
    return torch.cat(parts)


def codebooks_of(table: Tensor, letters: str) -> dict[str, Codebook]:
    """Inverse of `codeword_table` for some tiers: views of the table."""
    books, begin = {}, 0
    for letter, tier in TIERS.items():
        size = (tier.base_rows + tier.refinement_rows) * tier.d
        words = table[begin : begin + size].view(-1, tier.d)
        begin += size
        if letter in letters:
            base, refinement = words.split([tier.base_rows, tier.refinement_rows])
            books[letter] = Codebook(tier, base, refinement if tier.refinement_rows else None)
    return books
