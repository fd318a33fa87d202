"""Where the planes of one rank's experts lie in flat buffers, so that mixed tiers cost no padding.

A layer's routed experts live in six one-dimensional buffers: `gate_up_codes`, `gate_up_refinement`, `gate_up_scales`
for gate_proj and up_proj, `down_codes`, `down_refinement`, `down_scales` for down_proj. All offsets follow from
`config.json` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vqserve.format.config import PROJECTIONS, VQModule
from vqserve.format.geometry import Geometry
from vqserve.format.layout import plane_shape
from vqserve.format.tiers import GROUP, Tier

BUFFERS = ("gate_up_codes", "gate_up_refinement", "gate_up_scales", "down_codes", "down_refinement", "down_scales")


def buffer_name(proj: str, part: str) -> str:
    """The buffer that holds `part` (codes, refinement or scales) of a projection."""
    return f"{'down' if proj == 'down_proj' else 'gate_up'}_{part}"


@dataclass(frozen=True)
class Slot:
    """The planes of one projection of one expert, as sharded for one rank.

    Attributes:
        tier: How they are encoded.
        proj: Which projection, and so which buffers and which layout.
        rows: Out-features on this rank.
        columns: In-features on this rank.
        codes: First element in the buffer of codes.
        refinement: First element in the buffer of refinements; meaningless for a tier without one.
        scales: First element in the buffer of scales.
    """

    tier: Tier
    proj: str
    rows: int
    columns: int
    codes: int
    refinement: int
    scales: int

    @property
    def parts(self) -> tuple[str, ...]:
        """Which planes there are."""
        return ("codes", "refinement", "scales") if self.tier.refinement_rows else ("codes", "scales")

    def span(self, part: str) -> tuple[int, int]:
        """Offset and number of elements of `part` in its buffer."""
        offset = {"codes": self.codes, "refinement": self.refinement, "scales": self.scales}[part]
        return offset, _elements(self.tier, part, self.rows, self.columns)

    def shape(self, part: str) -> tuple[int, ...]:
        """Stored shape of `part` on this rank; its elements are contiguous in the buffer."""
        return plane_shape(self.tier, self.proj, part, self.rows, self.columns)


@dataclass(frozen=True)
class FlatLayout:
    """The slots of all experts of a rank, and the buffers' sizes.

    Attributes:
        experts: Global expert ids in local order.
        slots: Per local expert its projections by name.
        sizes: Elements of each of the six `BUFFERS`.
    """

    experts: tuple[int, ...]
    slots: tuple[Mapping[str, Slot], ...]
    sizes: Mapping[str, int]


def flat_layout(
    module: VQModule, geometry: Geometry, experts: Sequence[int] | None = None, tp_size: int = 1
) -> FlatLayout:
    """Lays the experts of one rank out, one after the other, gate_proj before up_proj.

    Args:
        module: The layer's record in `quantization_config`.
        geometry: The model's sizes; `check_shardable` has accepted `tp_size`.
        experts: Global ids of the experts on this rank, in local order; all of them if None.
        tp_size: Ranks that share every expert.
    """
    sizes = dict.fromkeys(BUFFERS, 0)
    local = tuple(range(module.experts) if experts is None else experts)
    slots: list[Mapping[str, Slot]] = []
    for expert in local:
        row: dict[str, Slot] = {}
        for proj in PROJECTIONS:
            rows, columns = geometry.expert_shape(proj)
            rows, columns = (rows, columns // tp_size) if proj == "down_proj" else (rows // tp_size, columns)
            at = {part: sizes[buffer_name(proj, part)] for part in ("codes", "refinement", "scales")}
            row[proj] = slot = Slot(module.tier(expert, proj), proj, rows, columns, **at)
            for part in at:
                sizes[buffer_name(proj, part)] += _elements(slot.tier, part, rows, columns)
        slots.append(row)
    return FlatLayout(local, tuple(slots), sizes)


def _elements(tier: Tier, part: str, rows: int, columns: int) -> int:
    if part == "scales":
        return rows * columns // GROUP
    return rows * (tier.code_bytes(columns) if part == "codes" else tier.refinement_bytes(columns))
