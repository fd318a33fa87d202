"""GLM-MoE-DSA with dense MLA attention, for platforms without the sparse kernels."""

from __future__ import annotations

from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.deepseek_v2 import GlmMoeDsaForCausalLM
from vllm.platforms import current_platform


class GlmMoeDsaDenseForCausalLM(GlmMoeDsaForCausalLM):
    """vLLM's generic GLM-MoE-DSA model, every token attending to all before it.

    Exact up to `index_topk` tokens, where the sparse selection takes everything anyway. The generic model uses sparse
    attention if its configuration has an attribute `index_topk`. The parent's class has one by default, so no override
    can remove it; a plain configuration without the `index_*` values is handed over instead. The indexer's weights
    are then skipped by vLLM's own loader.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        parent = vllm_config.model_config.hf_config
        config = PretrainedConfig(**{k: v for k, v in parent.to_dict().items() if not k.startswith("index_")})
        if current_platform.is_cpu():
            prefer_torch_rotary(vllm_config)
        super().__init__(vllm_config=vllm_config.with_hf_config(config), prefix=prefix)


def prefer_torch_rotary(vllm_config: VllmConfig) -> None:
    """Has torch compute rotary embeddings unless the caller insists on the op: WORKAROUNDS.md, "rotary"."""
    custom_ops = vllm_config.compilation_config.custom_ops
    if not {"+rotary_embedding", "-rotary_embedding"} & set(custom_ops):
        custom_ops.append("-rotary_embedding")
