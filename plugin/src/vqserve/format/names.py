"""Names of tensors and modules, built and taken apart in one place."""

from __future__ import annotations

import re
from typing import NamedTuple

_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.")
_EXPERTS = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.mlp\.experts")
_EXPERT_TENSOR = re.compile(
    r"(?P<module>model\.layers\.(?:0|[1-9][0-9]*)\.mlp\.experts)\.(?P<expert>0|[1-9][0-9]*)"
    r"\.(?P<proj>gate_proj|up_proj|down_proj)\.(?P<part>\w+)"
)


class ExpertTensor(NamedTuple):
    """The parts of an expert tensor's name: `{module}.{expert}.{proj}.{part}`."""

    module: str
    expert: int
    proj: str
    part: str


def experts_module(layer: int) -> str:
    """The module that holds the routed experts of `layer`."""
    return f"model.layers.{layer}.mlp.experts"


def expert_tensor(module: str, expert: int, proj: str, part: str) -> str:
    """The name of one tensor of an expert; `part` is codes, refinement, scales, or weight in an unquantized parent."""
    return f"{module}.{expert}.{proj}.{part}"


def codebook_name(module: str, tier: str, refinement: bool = False) -> str:
    """The name of a tier's base (or refinement) codebook below the routed experts `module`."""
    return f"{module}.routed_experts.codebook_{tier}{'_refinement' if refinement else ''}"


def parse_expert_tensor(name: str) -> ExpertTensor | None:
    """Takes an expert tensor's name apart; None if it is not one."""
    found = _EXPERT_TENSOR.fullmatch(name)
    if found is None:
        return None
    return ExpertTensor(found["module"], int(found["expert"]), found["proj"], found["part"])


def parse_experts_module(name: str) -> int | None:
    """The layer of a routed-experts module; None if the name is not one."""
    found = _EXPERTS.fullmatch(name)
    return None if found is None else int(found[1])


def layer_of(name: str) -> int | None:
    """The layer a tensor or module belongs to; None for embeddings, the final norm and the head."""
    found = _LAYER.match(name)
    return None if found is None else int(found[1])
