"""The vLLM plugin: serves vqserve checkpoints on unpatched vLLM. The only package that imports vllm.

vLLM calls `register` once in each of its processes, through the entry point `vllm.general_plugins`, and
`readiness_plugin` once in its API server, through `vllm.endpoint_plugins`. It reports an exception raised while this
module is imported as "unknown quantization method" at best, so nothing is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vqserve.vllm_plugin.readiness import ReadinessPlugin


def register() -> None:
    """Makes the quantization method `vqserve` and the dense-attention model class known to vLLM. Idempotent."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform

    from vqserve.format.config import QUANT_METHOD
    from vqserve.vllm_plugin.config import VQServeConfig

    register_quantization_config(QUANT_METHOD)(VQServeConfig)
    dense = "vqserve.vllm_plugin.dense:GlmMoeDsaDenseForCausalLM"
    ModelRegistry.register_model("GlmMoeDsaDenseForCausalLM", dense)
    if current_platform.is_cpu():
        # vLLM's own class needs sparse attention, which it has not on CPUs, so nothing that works is displaced.
        ModelRegistry.register_model("GlmMoeDsaForCausalLM", dense)


def readiness_plugin() -> ReadinessPlugin:
    """Makes the routes `/ready` and `/drain`."""
    from vqserve.vllm_plugin.readiness import ReadinessPlugin

    return ReadinessPlugin()
