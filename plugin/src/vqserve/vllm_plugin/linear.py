"""The spine's 4-bit linear layers: vLLM's own GPTQ method, or dequantized at load where vLLM cannot multiply by 4 bit.

vLLM's CPU build holds libraries for AVX-512 and one for AVX2; the latter has no 4-bit GEMM (WORKAROUNDS.md, "spine
without AVX-512"), and the former's takes no float32. The checkpoint and its loading are the same with both methods:

    loaded     qweight i32 [K/8, N]   scales bf16 [K/128, N]   qzeros i32 [K/128, N/8]
    computed   weight [N, K] in the model's dtype

with K and N those of this rank, and N those of all layers that vLLM has fused into one.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm._custom_ops  # noqa: F401 - loads the library whose operators `why_dequantized` looks for
from torch import nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import current_platform

from vqserve.format.errors import UsageError
from vqserve.format.tiers import GROUP
from vqserve.reference.gptq import dequantize_gptq
from vqserve.settings import SPINE, wanted_spine

_PER_WORD = 8
"""4-bit numbers in an int32."""


def why_dequantized(dtype: torch.dtype) -> str | None:
    """Why the spine is dequantized at load in a model of this dtype; None if it stays in 4 bit.

    Raises:
        UsageError: The environment variable `SPINE` asks for what vLLM cannot do, or for something unknown.
    """
    reason = None
    if current_platform.is_cpu() and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        reason = "vLLM has no 4-bit GEMM for CPUs without AVX-512"
    elif dtype == torch.float32:
        reason = "vLLM's 4-bit GEMM takes no float32"
    wanted = wanted_spine()
    if reason and wanted == "packed":
        raise UsageError(f"{SPINE}=packed: {reason}; set it to dequantized, or unset it")
    return reason or (f"{SPINE} asks for it" if wanted == "dequantized" else None)


def spine_method(dtype: torch.dtype) -> LinearMethodBase:
    """The method for a layer that is stored in 4 bit, in a model of this dtype; raises as `why_dequantized`."""
    if why_dequantized(dtype):
        return DequantizedLinearMethod()
    config = AutoGPTQConfig(
        weight_bits=4,
        group_size=GROUP,
        desc_act=False,
        is_sym=True,
        lm_head_quantized=False,
        dynamic={},
        full_config={},
    )
    # The stock class itself: vLLM picks the weight loader by the name of the method's class.
    return AutoGPTQLinearMethod(config)


@register_weight_loader_v2_supported_method
class DequantizedLinearMethod(UnquantizedLinearMethod):
    """Loads 4-bit tensors, and from then on is vLLM's method for unquantized layers."""

    supports_pre_processed_weights = False

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers the stored tensors as parameters of `layer`, in the shapes of this rank's shard."""
        columns, rows = input_size_per_partition, sum(output_partition_sizes)
        axes = {"input_dim": 0, "output_dim": 1, "weight_loader": extra_weight_attrs["weight_loader"]}
        packed = {**axes, "packed_factor": _PER_WORD}
        words = torch.empty(columns // _PER_WORD, rows, dtype=torch.int32)
        scales = torch.empty(columns // GROUP, rows, dtype=torch.bfloat16)
        zeros = torch.empty(columns // GROUP, rows // _PER_WORD, dtype=torch.int32)
        layer.register_parameter("qweight", PackedvLLMParameter(data=words, packed_dim=0, **packed))
        layer.register_parameter("scales", GroupQuantScaleParameter(data=scales, **axes))
        layer.register_parameter("qzeros", PackedvLLMParameter(data=zeros, packed_dim=1, **packed))
        self._dtype = params_dtype

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Puts the weights that the 4-bit tensors stand for in their place."""
        weight = dequantize_gptq(layer.get_parameter("qweight"), layer.get_parameter("scales"), self._dtype)
        del layer.qweight, layer.scales, layer.qzeros
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        super().process_weights_after_loading(layer)
