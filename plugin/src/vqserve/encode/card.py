"""The model card of an encoded checkpoint: licence, base model, where the bits went, and measured errors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqserve.encode.plan import Plan
from vqserve.encode.steps import SENSITIVITY_TEMPERATURE
from vqserve.format.card import scores_section
from vqserve.format.config import PROJECTIONS, VQModule
from vqserve.format.geometry import Geometry
from vqserve.format.layout import checkpoint_specs, expert_specs
from vqserve.format.tiers import TIERS

_LICENSE = re.compile(r"""^license:\s*["']?([^\s"'#].*?)["']?\s*(?:\s#.*)?$""", re.MULTILINE)
_PLAIN = re.compile(r"(?!(?:true|false|yes|no|on|off|null|y|n)$)[a-z][\w./-]*", re.IGNORECASE | re.ASCII)
"""What YAML reads as that very text."""


@dataclass(frozen=True)
class Origin:
    """Where the checkpoint comes from.

    Attributes:
        base_model: Name of the parent.
        license: Its licence, as model cards name it.
        calibration: Name of the calibration file.
        tokens: Calibration tokens.
        predictions: Those whose prediction counts.
        experts: Routed experts of the parent.
        unseen: Those without a calibration token: their codes follow the layer's statistics alone.
        zeros: Projections that are all 0, of pruned experts: they are encoded exactly.
        seed: Of all random choices.
        version: Of the encoder.
    """

    base_model: str
    license: str
    calibration: str
    tokens: int
    predictions: int
    experts: int
    unseen: int
    zeros: int
    seed: int
    version: str


def parent_license(folder: Path) -> str:
    """The licence in the front matter of the parent's model card; `unknown` if it states none."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    front = text.split("\n---", 1)[0] if text.startswith("---\n") else ""
    found = _LICENSE.search(front)
    return found[1] if found else "unknown"


def model_card(plan: Plan, origin: Origin, config: Mapping[str, Any]) -> str:
    """The card as Markdown with a YAML front matter.

    Args:
        plan: What was chosen.
        origin: Where it comes from.
        config: The whole `config.json` of the result.
    """
    geometry = Geometry.from_dict(config)
    experts = sum(spec.nbytes for module in plan.config.modules for spec in expert_specs(module, geometry))
    total = sum(spec.nbytes for spec in checkpoint_specs(config).values() if spec.required)
    return f"""---
license: {yaml_text(origin.license)}
base_model: {yaml_text(origin.base_model)}
base_model_relation: quantized
library_name: vllm
pipeline_tag: text-generation
tags: [vqserve, vector-quantization]
---

# {origin.base_model}, vector-quantized to {plan.bits:.3f} bits per routed-expert weight

Routed experts are stored as codes into shared codebooks, each projection of each expert in a tier of its own; other
large linear layers in 4 bit (GPTQ, group 128); the rest as in the parent. Serve it with `vqserve serve`.

| | |
|---|---|
| bits per routed-expert weight, scales included | {plan.bits:.4f} |
| bytes of routed experts | {experts:,} |
| bytes in all | {total:,} |
| allocation cost | {plan.cost:.3g} |
| calibration | {origin.calibration}: {origin.tokens:,} tokens, {origin.predictions:,} predictions |
| experts without a calibration token | {origin.unseen:,} of {origin.experts:,} |
| projections that are all 0 | {origin.zeros:,} of {3 * origin.experts:,} |
| encoder | vqserve {origin.version}, seed {origin.seed} |

## Scores

{scores_section("Not measured yet.")}

## Where the bits went

Experts per tier ({", ".join(f"{tier.id}: {tier.bits:g} bit" for tier in TIERS.values())}; scales add
{TIERS["a"].effective_bits - TIERS["a"].bits:g}), and the squared error of the projection's output relative to the
output, on the calibration text, averaged over experts. Tiers were chosen for the least allocation cost: to second
order, the KL divergence of predictions at temperature {SENSITIVITY_TEMPERATURE:g}, in nats per token. It ranks
choices; what the encoding costs is among the scores.

{_allocation(plan)}
"""


def _allocation(plan: Plan) -> str:
    lines = [
        f"| layer | projection | {' | '.join(TIERS)} | bits | error |",
        f"|---|---|{'---|' * len(TIERS)}---|---|",
    ]
    for module, errors in zip(plan.config.modules, plan.errors, strict=True):
        for p, proj in enumerate(PROJECTIONS):
            counts = [module.tiers[proj].count(letter) for letter in TIERS]
            bits = _bits(module, proj)
            numbers = " | ".join(map(str, counts))
            lines.append(f"| {module.name} | {proj} | {numbers} | {bits:.3f} | {errors[:, p].mean():.4f} |")
    return "\n".join(lines)


def _bits(module: VQModule, proj: str) -> float:
    return sum(TIERS[letter].effective_bits for letter in module.tiers[proj]) / module.experts


def yaml_text(text: str) -> str:
    """A text as YAML: in quotes if it might be read as something else."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
