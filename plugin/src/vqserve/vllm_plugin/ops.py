"""`torch.ops.vqserve.moe`: the routed experts as one operator that torch.compile does not look into."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from vqserve.format.flat import BUFFERS, FlatLayout
from vqserve.kernels.experts import KernelExperts, codebooks_of, places
from vqserve.kernels.vq_moe import cpu

_LIBRARY = torch.library.Library("vqserve", "FRAGMENT")
_LAYOUTS: list[FlatLayout] = []


def add_layout(layout: FlatLayout) -> int:
    """Keeps `layout` for the operator, whose arguments can only be tensors and numbers; returns its number."""
    _LAYOUTS.append(layout)
    return len(_LAYOUTS) - 1


def prepare(device: torch.device) -> None:
    """Compiles the operator's kernels for a GPU.

    Raises:
        UsageError: They cannot be compiled.
    """
    from vqserve.kernels.moe import compile_all  # needs triton, which CPUs' environments lack

    compile_all(device)


def moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    buffers: list[Tensor],
    codewords: Tensor,
    tiers: str,
    layout: int,
    expert_map: Tensor | None,
) -> Tensor:
    """Applies this rank's experts, by `vqserve.kernels`.

    The first call for a layout on a GPU copies a table there; later ones can be captured in a CUDA graph.

    Args:
        x: [T, H], bf16, fp16 or fp32.
        topk_weights: fp32 [T, k].
        topk_ids: int32 or int64 [T, k], global expert ids; -1 is skipped.
        buffers: The six flat buffers in the order of `format.flat.BUFFERS`: on a GPU in the kernels' order, elsewhere
            in the checkpoint's.
        codewords: fp16, all codebooks, from `kernels.experts.codeword_table`.
        tiers: Ids of the tiers that the layer uses.
        layout: Number of the experts' layout, from `add_layout`.
        expert_map: Global to local expert id, -1 for another rank's; None if all are local.

    Returns:
        [T, H] in x's dtype, not reduced over ranks.
    """
    if not x.is_cuda:
        flat = dict(zip(BUFFERS, buffers, strict=True))
        stored = cpu.TabledExperts(_LAYOUTS[layout], flat, codebooks_of(codewords, tiers))
        return cpu.moe(x, topk_weights, topk_ids, stored, expert_map)
    from vqserve.kernels.moe import moe as kernels_moe

    down = _LAYOUTS[layout].slots[0]["down_proj"]
    experts = KernelExperts(tuple(buffers), _places(layout, x.device), codewords, down.rows, down.columns)
    return kernels_moe(x, topk_weights, topk_ids, experts, expert_map)


@cache
def _places(layout: int, device: torch.device) -> Tensor:
    return places(_LAYOUTS[layout], device)


def _moe_fake(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    buffers: list[Tensor],
    codewords: Tensor,
    tiers: str,
    layout: int,
    expert_map: Tensor | None,
) -> Tensor:
    return torch.empty_like(x)


direct_register_custom_op("moe", moe, mutates_args=[], fake_impl=_moe_fake, target_lib=_LIBRARY)
