"""A parent's `config.json` as it would be once encoded, to plan for a checkpoint that does not exist yet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from vqserve.arguments import shortened
from vqserve.format.config import PROJECTIONS, QuantConfig, Spine, VQModule
from vqserve.format.errors import UsageError
from vqserve.format.geometry import Geometry
from vqserve.format.layout import spine_modules
from vqserve.format.tiers import TIERS

SEED_MIX = {"a": 0.27, "c": 0.59, "d": 0.14}
"""Shares of the routed experts' weights per tier in the GLM-5.2-VQ-Arith model card: 1.86 bits without scales."""

_SHARE = re.compile(r"[0-9]{1,15}(\.[0-9]{0,15})?|\.[0-9]{1,15}")


def read_mix(text: str) -> dict[str, float]:
    """Reads shares such as `a=27,c=59,d=14`, in any unit.

    Returns:
        Shares that sum to 1, by tier id.

    Raises:
        UsageError: Not of this form, an unknown tier, or nothing at all.
    """
    shares: dict[str, float] = {}
    for item in text.split(","):
        letter, _, share = item.partition("=")
        known = letter in TIERS and letter not in shares
        if not known or _SHARE.fullmatch(share) is None:
            raise UsageError(
                f"--tiers {shortened(text)}: expected shares of {', '.join(TIERS)}, each once, such as a=27,c=59,d=14"
            )
        shares[letter] = float(share)
    total = sum(shares.values())
    if total == 0:
        raise UsageError(f"--tiers {shortened(text)}: all shares are 0; give one that is not, such as a=27,c=59,d=14")
    return {letter: share / total for letter, share in shares.items()}


def mix_for(bits: float) -> dict[str, float]:
    """The two neighbouring tiers, and how much of each, that come to so many bits per weight, scales included.

    Raises:
        UsageError: No mix does; the message names the range.
    """
    for low, high in pairwise(TIERS.values()):
        if low.effective_bits <= bits <= high.effective_bits:
            share = (bits - low.effective_bits) / (high.effective_bits - low.effective_bits)
            return {low.id: 1 - share, high.id: share}
    tiers = list(TIERS.values())
    reachable = f"{tiers[0].effective_bits:g} to {tiers[-1].effective_bits:g}"
    raise UsageError(f"--bits {bits:g}: out of reach; choose from {reachable} bits per routed-expert weight")


def assumed(config: Mapping[str, Any], mix: Mapping[str, float]) -> dict[str, Any]:
    """The configuration with all routed experts in the tiers of `mix` and every linear layer that can be in 4 bit.

    Args:
        config: A parsed `config.json` without `quantization_config`.
        mix: Shares that sum to 1, by tier id; met as closely as whole experts allow.

    Raises:
        ConfigError: The configuration is not a GLM-MoE-DSA model's.
    """
    geometry = Geometry.from_dict(config)
    letters = _letters(mix, geometry.n_routed_experts)
    modules = tuple(VQModule(name, dict.fromkeys(PROJECTIONS, letters)) for name in geometry.experts_modules)
    return {**config, "quantization_config": QuantConfig(modules, Spine(spine_modules(geometry))).to_dict()}


def _letters(mix: Mapping[str, float], experts: int) -> str:
    """One letter per expert, every tier spread evenly: ranks that share experts out get about the same of each."""
    counts = {letter: int(share * experts) for letter, share in mix.items()}
    by_remainder = sorted(mix, key=lambda letter: counts[letter] - mix[letter] * experts)
    for letter in by_remainder[: experts - sum(counts.values())]:
        counts[letter] += 1
    placed = [((at + 0.5) / count, letter) for letter, count in counts.items() for at in range(count)]
    return "".join(letter for _, letter in sorted(placed))
