"""Routed experts of mixed tiers: vLLM's MoE method for a module with `format: "vq"`.

A rank's experts lie one after the other in six flat buffers (`format.flat`), so that tiers of different size need no
padding. The buffers and the codebooks are the layer's parameters, under the names that vLLM's model code derives from
the checkpoint's:

    model.layers.N.mlp.experts.E.gate_proj.codes                 -> ...experts.routed_experts.w13_codes, shard w1
    model.layers.N.mlp.experts.E.down_proj.scales                -> ...experts.routed_experts.w2_scales, shard w2
    model.layers.N.mlp.experts.routed_experts.codebook_b         -> itself

Shards need no arithmetic here: the first axis of every expert tensor is its tensor-parallel axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts

from vqserve.format.config import VQModule
from vqserve.format.flat import BUFFERS, buffer_name, flat_layout
from vqserve.format.geometry import Geometry
from vqserve.format.layout import check_shardable, codebook_specs, expert_specs, shard_slice
from vqserve.format.names import expert_tensor, parse_expert_tensor
from vqserve.format.tiers import TIERS
from vqserve.kernels.experts import codeword_table
from vqserve.kernels.repack.order import repack
from vqserve.reference.dequantize import Codebook
from vqserve.reference.moe import Experts
from vqserve.vllm_plugin import ops
from vqserve.vllm_plugin.loading import LoadRecord, check_finite
from vqserve.vllm_plugin.tracing import EXPERTS, span

_SCALES = tuple(name for name in BUFFERS if name.endswith("_scales"))
_PROJECTION = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class MixedVQMoEMethod(FusedMoEMethodBase):
    """Loads and applies the vector-quantized experts of one layer.

    Args:
        moe: vLLM's description of the layer, ranks included.
        module: The layer's record in `quantization_config`.
        geometry: The model's sizes.
    """

    def __init__(self, moe: FusedMoEConfig, module: VQModule, geometry: Geometry) -> None:
        super().__init__(moe)
        self.module = module
        self.geometry = geometry
        self.tiers = "".join(tier.id for tier in module.used_tiers())
        self._codewords: Tensor | None = None

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None  # describes weights for vLLM's own kernels; ours are not

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers the flat buffers and the codebooks as parameters of `layer`, each with its loader.

        Raises:
            UsageError: The experts do not split into whole groups of columns at this tensor-parallel size.
        """
        check_shardable(self.geometry, self.moe.tp_size)
        placed = {e: layer._map_global_expert_id_to_local_expert_id(e) for e in range(self.module.experts)}
        self._local = {expert: at for expert, at in placed.items() if at >= 0}
        experts = sorted(self._local, key=self._local.__getitem__)
        assert len(experts) == num_experts, "one slot per local expert: no redundant experts without EPLB"
        self.layout = flat_layout(self.module, self.geometry, experts, self.moe.tp_size)
        self._layout_number = ops.add_layout(self.layout)
        codebooks = list(codebook_specs(self.module))
        planes = ((parse_expert_tensor(spec.name), spec) for spec in expert_specs(self.module, self.geometry))
        mine = (spec for name, spec in planes if name is not None and name.expert in self._local)
        self._record = LoadRecord(self.module.name, [*mine, *codebooks])
        self._dummy = get_current_vllm_config().load_config.load_format == "dummy"

        for name, size in self.layout.sizes.items():
            dtype = torch.float16 if name.endswith("scales") else torch.uint8
            part = name.rpartition("_")[2]
            _add_parameter(layer, _parameter(name), torch.empty(size, dtype=dtype), self._plane_loader(part))
        self._codebook_names = []
        for spec in codebooks:
            name = spec.name.rpartition(".")[2]
            empty = torch.empty(spec.shape, dtype=torch.float16)
            _add_parameter(layer, name, empty, self._codebook_loader(spec.name))
            self._codebook_names.append(name)

    def _plane_loader(self, part: str) -> Callable[..., bool | None]:
        def load_plane(
            param: nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            """vLLM's weight loader: copies this rank's shard of one plane; False if the expert is another rank's."""
            local = self._local.get(expert_id)
            if local is None:
                return False if return_success else None
            proj = _PROJECTION[shard_id]
            self._note(param, expert_tensor(self.module.name, expert_id, proj, part), loaded_weight)
            slot = self.layout.slots[local][proj]
            shard = loaded_weight[shard_slice(loaded_weight.shape[0], self.moe.tp_rank, self.moe.tp_size)]
            param.data.narrow(0, *slot.span(part)).view(slot.shape(part)).copy_(shard)
            return True if return_success else None

        return load_plane

    def _codebook_loader(self, name: str) -> Callable[..., None]:
        def load_codebook(param: nn.Parameter, loaded_weight: Tensor) -> None:
            self._note(param, name, loaded_weight)
            param.data.copy_(loaded_weight)

        return load_codebook

    def _note(self, param: nn.Parameter, name: str, tensor: Tensor) -> None:
        # On a reload vLLM first runs every loader on a meta tensor, to count elements: no arrival yet.
        self._record.check(name, tensor)
        if not param.is_meta:
            self._record.note(name)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Ends a load: on a GPU brings the planes into the kernels' order.

        Raises:
            TensorError: A tensor of this rank's has not arrived, or scales or a codebook are not finite.
        """
        held = sum(getattr(layer, _parameter(name)).nbytes for name in BUFFERS)
        with span(EXPERTS, layer=self.module.name, experts=len(self.layout.experts), bytes=held):
            self._prepare(layer)

    def _prepare(self, layer: RoutedExperts) -> None:
        loaded = not (self._dummy and self._record.empty)
        if loaded:
            self._record.close()
            self._check_values(layer)
        parts = iter(getattr(layer, name).data for name in self._codebook_names)
        used = [TIERS[letter] for letter in self.tiers]
        books = {t.id: Codebook(t, next(parts), next(parts) if t.refinement_rows else None) for t in used}
        buffers = {name: getattr(layer, _parameter(name)).data for name in BUFFERS}
        table = codeword_table(books, buffers[BUFFERS[0]].device)
        if self._codewords is None:
            self._codewords = table
        else:
            self._codewords.copy_(table)  # a reload: CUDA graphs know the first one's address
        if table.is_cuda:
            ops.prepare(table.device)
            if loaded:
                repack(Experts(self.layout, buffers, books))

    def _check_values(self, layer: RoutedExperts) -> None:
        stem = f"{self.module.name}.routed_experts"
        check_finite((f"{stem}.{name}", getattr(layer, name)) for name in self._codebook_names)
        # One look at each buffer, and one at each expert's part only to find the name.
        if not all(getattr(layer, name).isfinite().all() for name in map(_parameter, _SCALES)):
            check_finite(self._scales(layer))

    def _scales(self, layer: RoutedExperts) -> Iterator[tuple[str, Tensor]]:
        for expert, slots in zip(self.layout.experts, self.layout.slots, strict=True):
            for proj, slot in slots.items():
                scales = getattr(layer, _parameter(buffer_name(proj, "scales"))).narrow(0, *slot.span("scales"))
                yield expert_tensor(self.module.name, expert, proj, "scales"), scales

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: object,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The routed experts' sum for x [T, H], not reduced over ranks; vLLM adds shared experts and scaling."""
        buffers = [getattr(layer, _parameter(name)) for name in BUFFERS]
        moe = torch.ops.vqserve.moe
        out: Tensor = moe(
            x, topk_weights, topk_ids, buffers, self._codewords, self.tiers, self._layout_number, layer.expert_map
        )
        return out


def _add_parameter(layer: nn.Module, name: str, data: Tensor, loader: Callable[..., object]) -> None:
    parameter = nn.Parameter(data, requires_grad=False)
    parameter.weight_loader = loader  # type: ignore[attr-defined]  # where vLLM looks for it
    layer.register_parameter(name, parameter)


def _parameter(buffer: str) -> str:
    """The parameter that is a flat buffer: vLLM maps gate_proj and up_proj to names with `w13`, down_proj with `w2`."""
    return buffer.replace("gate_up", "w13").replace("down", "w2")
