from __future__ import annotations

import random

import pytest

from random_parent import CONFIG
from vqserve.format.config import PROJECTIONS, VQModule
from vqserve.format.flat import BUFFERS, FlatLayout, buffer_name, flat_layout
from vqserve.format.geometry import Geometry
from vqserve.format.layout import expert_specs

GEOMETRY = Geometry.from_dict({**CONFIG, "hidden_size": 384, "moe_intermediate_size": 512})


def _module(seed: int) -> VQModule:
    chooser = random.Random(seed)
    return VQModule("model.layers.1.mlp.experts", {p: "".join(chooser.choices("abcd", k=16)) for p in PROJECTIONS})


def _assert_slots_fill_buffers(layout: FlatLayout) -> None:
    ends = dict.fromkeys(BUFFERS, 0)
    for row in layout.slots:
        for proj in PROJECTIONS:
            for part in row[proj].parts:
                offset, length = row[proj].span(part)
                assert offset == ends[buffer_name(proj, part)]
                size = 1
                for axis in row[proj].shape(part):
                    size *= axis
                assert length == size > 0
                ends[buffer_name(proj, part)] += length
    assert ends == layout.sizes


def test_slots_fill_the_buffers_without_gap_or_overlap(seed: int) -> None:
    _assert_slots_fill_buffers(flat_layout(_module(seed), GEOMETRY))
    _assert_slots_fill_buffers(flat_layout(_module(seed), GEOMETRY, experts=[7, 2, 11], tp_size=4))


def test_the_buffers_hold_the_checkpoint_s_bytes_and_no_more(seed: int) -> None:
    module = _module(seed)
    stored = sum(spec.nbytes for spec in expert_specs(module, GEOMETRY))
    sizes = flat_layout(module, GEOMETRY).sizes
    assert sum(size * (2 if name.endswith("scales") else 1) for name, size in sizes.items()) == stored


@pytest.mark.parametrize("tp_size", [2, 4])
def test_each_rank_holds_its_equal_part(seed: int, tp_size: int) -> None:
    whole, part = flat_layout(_module(seed), GEOMETRY), flat_layout(_module(seed), GEOMETRY, tp_size=tp_size)
    assert {name: size * tp_size for name, size in part.sizes.items()} == whole.sizes


def test_local_experts_keep_their_own_tiers(seed: int) -> None:
    module = _module(seed)
    layout = flat_layout(module, GEOMETRY, experts=[9, 3])
    assert layout.experts == (9, 3)
    assert [[row[p].tier.id for p in PROJECTIONS] for row in layout.slots] == [
        [module.tiers[p][expert] for p in PROJECTIONS] for expert in (9, 3)
    ]
