"""The four tiers: how many bits one routed-expert weight costs, and how its codes are laid out.

A code picks one codeword of `d` weights from a base codebook of 256 rows; additive tiers add one of 16 rows of a
refinement codebook. Both planes are byte-aligned: one byte per base code, two refinement codes per byte (low nibble
first). One fp16 scale serves one row of 128 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 128
"""Columns that share one scale."""

BASE_ROWS = 256
"""Codewords of every base codebook: one byte of code, so that every byte is a valid code."""

SCALE_BYTES = 2


@dataclass(frozen=True)
class Tier:
    """One way to encode a projection of an expert.

    Attributes:
        id: The letter that stands for it in `config.json`.
        bits: Code bits per weight; scales come on top (see `effective_bits`).
        d: Weights per codeword.
        refinement_rows: Codewords of the refinement codebook, or 0 if the tier has none.
    """

    id: str
    bits: float
    d: int
    refinement_rows: int

    @property
    def base_rows(self) -> int:
        """Codewords of the base codebook."""
        return BASE_ROWS

    @property
    def effective_bits(self) -> float:
        """Bits per weight, scales included."""
        return self.bits + 8 * SCALE_BYTES / GROUP

    def code_bytes(self, columns: int) -> int:
        """Bytes of one row of the base plane."""
        return columns // self.d

    def refinement_bytes(self, columns: int) -> int:
        """Bytes of one row of the refinement plane; 0 for a tier without one."""
        return columns // self.d // 2 if self.refinement_rows else 0

    def weight_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a whole projection: both planes and the scales."""
        return rows * (self.code_bytes(columns) + self.refinement_bytes(columns) + SCALE_BYTES * columns // GROUP)


TIERS: dict[str, Tier] = {
    "a": Tier("a", bits=1.0, d=8, refinement_rows=0),
    "b": Tier("b", bits=1.5, d=8, refinement_rows=16),
    "c": Tier("c", bits=2.0, d=4, refinement_rows=0),
    "d": Tier("d", bits=3.0, d=4, refinement_rows=16),
}
