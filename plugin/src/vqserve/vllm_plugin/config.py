"""Which layer of the model is computed how: `quantization_config` of the checkpoint, as vLLM's `QuantizationConfig`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from vqserve.format.config import QUANT_METHOD, QuantConfig
from vqserve.format.errors import ConfigError
from vqserve.format.files import check_checkpoint
from vqserve.format.geometry import Geometry
from vqserve.format.layout import check_shardable, gptq_specs, spine_shapes
from vqserve.vllm_plugin.linear import spine_method, why_dequantized
from vqserve.vllm_plugin.moe import MixedVQMoEMethod
from vqserve.vllm_plugin.tracing import VERIFY, span

_check_shardable = cache(check_shardable)  # asked for every layer

# Below vLLM's own, since only that logger shows anything.
_logger = init_logger(f"vllm.{__name__}")


class VQServeConfig(QuantizationConfig):
    """Selects the method of each layer: VQ where a record says `format: "vq"`, 4-bit GPTQ for the spine, else none."""

    def __init__(self, quant: QuantConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # vllm's
        self.quant = quant
        self.geometry: Geometry | None = None
        self._spine = frozenset(quant.spine.modules if quant.spine else ())

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # bfloat16

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VQServeConfig:
        """Reads the `quantization_config` of a checkpoint.

        Raises:
            ConfigError: It is not one of a version this release knows.
        """
        return cls(QuantConfig.from_dict(config))

    def maybe_update_config(
        self, model_name: str, hf_config: PretrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Learns the model's sizes and checks the headers of a local checkpoint, before anything is loaded.

        For quantized models vLLM's own loader misses no absent tensor, and passes over some surplus ones.

        Raises:
            CheckpointError: The configuration or a tensor is not what the format calls for.
        """
        assert hf_config is not None, "vLLM 0.32 always passes it"
        # `vqserve serve` overrides the architecture, to have dense attention.
        self.geometry = Geometry.from_dict({**hf_config.to_dict(), "architectures": None})
        folder = Path(model_name)
        if any(folder.glob("*.safetensors")):  # not so for `--load-format dummy` on a configuration alone
            with span(VERIFY, folder=str(folder)):
                check_checkpoint(folder, digests=False)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer, None for what has no weights of its own.

        Raises:
            UsageError: The model cannot be split over this many ranks, or its spine not stay in 4 bit though it is to.
        """
        vllm_config = get_current_vllm_config()
        parallel = vllm_config.parallel_config
        ranks, whole = parallel.tensor_parallel_size, parallel.enable_expert_parallel
        assert self.geometry is not None
        _check_shardable(self.geometry, ranks, self.quant.spine, whole_experts=whole)
        if isinstance(layer, RoutedExperts):
            module = self.quant.module(prefix)
            if module is None:
                return UnquantizedFusedMoEMethod(layer.moe_config)
            return MixedVQMoEMethod(layer.moe_config, module, self.geometry)
        if isinstance(layer, LinearBase):
            return self._spine_method(vllm_config) if self._in_spine(prefix) else UnquantizedLinearMethod()
        return None

    def _in_spine(self, prefix: str) -> bool:
        stem, _, leaf = prefix.rpartition(".")
        parts = [f"{stem}.{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]
        listed = [part in self._spine for part in parts]
        if any(listed) != all(listed):
            raise ConfigError(
                "config.json: quantization_config.spine.modules",
                f"expected all or none of {', '.join(parts)}, which vLLM fuses into one layer",
                "re-encode the parent",
            )
        return all(listed)

    def _spine_method(self, vllm_config: VllmConfig) -> LinearMethodBase:
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype), "vLLM has resolved names of dtypes by now"
        if reason := why_dequantized(dtype):
            self._say_that_the_spine_grows(reason, dtype)
        return spine_method(dtype)

    def _say_that_the_spine_grows(self, reason: str, dtype: torch.dtype) -> None:
        assert self.geometry is not None
        shapes = spine_shapes(self.geometry)
        loaded = {name: shape for name, shape in shapes.items() if name in self._spine and ".indexer." not in name}
        stored = sum(spec.nbytes for name, shape in loaded.items() for spec in gptq_specs(name, *shape))
        weights = sum(rows * columns for rows, columns in loaded.values())
        _logger.warning_once(
            "vqserve: %s: %d layers are dequantized at load, to %.1f MB of %s instead of %.1f MB",
            reason,
            len(loaded),
            dtype.itemsize * weights / 1e6,
            str(dtype).removeprefix("torch."),
            stored / 1e6,
        )
