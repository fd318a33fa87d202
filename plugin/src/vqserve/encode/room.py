"""Whether the disks have room for an encode, looked at before hours of work."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from vqserve.encode.parent import Parent
from vqserve.encode.plan import byte_budget
from vqserve.encode.steps import GRADIENT_TOKENS
from vqserve.format.atomic import no_room
from vqserve.format.config import PROJECTIONS, Spine
from vqserve.format.layout import spine_modules, spine_specs
from vqserve.format.names import layer_of, parse_expert_tensor
from vqserve.format.tiers import TIERS


def check_room(parent: Parent, tokens: int, bits: float, dst: Path, work: Path) -> None:
    """Checks that the largest of what an encode writes fits, less what lies there already.

    Args:
        parent: The checkpoint to encode.
        tokens: Calibration tokens.
        bits: Bits per routed-expert weight.
        dst: Folder of the result: the experts in their tiers, the 4-bit layers, and what is kept as it was.
        work: Folder of the results of steps: every expert in every tier, the 4-bit layers, and what goes into and out
            of the layers for each token, in 2 bytes at least.

    Raises:
        UsageError: It does not fit.
    """
    geometry, (spine, planes, kept) = parent.geometry, _sizes(parent)
    flowing = (tokens + 2 * min(tokens, GRADIENT_TOKENS)) * geometry.hidden_size * 2 * len(geometry.moe_layers)
    lacking: Counter[int] = Counter()
    places: dict[int, tuple[Path, Path]] = {}
    for folder, nbytes in ((dst, byte_budget(geometry, bits) + spine + kept), (work, planes + spine + flowing)):
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        disk = place.stat().st_dev
        lacking[disk] += max(0, nbytes - there)
        places.setdefault(disk, (folder, place))
    for disk, (folder, place) in places.items():
        if lacking[disk] > shutil.disk_usage(place).free:
            raise no_room(folder, f"an encode takes at least {lacking[disk]:,} bytes more")


def _sizes(parent: Parent) -> tuple[int, int, int]:
    """Bytes of the 4-bit layers, of the experts in every tier, and of the tensors that are kept."""
    geometry = parent.geometry
    modules = spine_modules(geometry)
    packed = {f"{name}.weight" for name in modules}
    each = sum(tier.weight_bytes(*geometry.expert_shape(proj)) for tier in TIERS.values() for proj in PROJECTIONS)
    kept = sum(
        tensor.nbytes
        for name, tensor in parent.tensors.items()
        if name not in packed and parse_expert_tensor(name) is None and layer_of(name) not in geometry.mtp_layers
    )
    spine = sum(spec.nbytes for spec in spine_specs(Spine(modules), geometry))
    return spine, each * geometry.n_routed_experts * len(geometry.moe_layers), kept
