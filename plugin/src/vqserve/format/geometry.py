"""The shape of a GLM-MoE-DSA model, read from its `config.json` and validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vqserve.format.errors import ConfigError
from vqserve.format.names import experts_module
from vqserve.format.tiers import GROUP
from vqserve.format.variants import check_variant

MODEL_TYPE = "glm_moe_dsa"

_FIX = "correct the parent's config.json; vqserve takes GLM-MoE-DSA models only"
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "max_position_embeddings",
)
# Far above any model, and low enough that a damaged number cannot make us list tensors for hours.
_MOST = {"num_hidden_layers": 1000, "n_routed_experts": 4096, "num_nextn_predict_layers": 16}
_MOST_OTHERWISE = 1 << 31


@dataclass(frozen=True)
class Geometry:
    """Sizes of a GLM-MoE-DSA model, under the names that its `config.json` uses.

    Attributes:
        first_k_dense_replace: Leading layers with a dense MLP; all others have routed experts.
        num_nextn_predict_layers: Multi-token-prediction layers behind the last one; their tensors may be absent.
        indexer_types: Per layer `full` (has an indexer) or `shared` (reuses the last full layer's selection).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    max_position_embeddings: int
    first_k_dense_replace: int
    num_nextn_predict_layers: int
    indexer_types: tuple[str, ...]

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts, which are stored as one MLP."""
        return self.moe_intermediate_size * self.n_shared_experts

    @property
    def moe_layers(self) -> range:
        """Layers with routed experts, without the multi-token-prediction layers."""
        return range(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def mtp_layers(self) -> range:
        """The multi-token-prediction layers."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)

    @property
    def experts_modules(self) -> tuple[str, ...]:
        """Names of the routed-experts modules of `moe_layers`."""
        return tuple(experts_module(layer) for layer in self.moe_layers)

    def expert_shape(self, proj: str) -> tuple[int, int]:
        """Rows (out-features) and columns (in-features) of one projection of a routed expert."""
        if proj == "down_proj":
            return self.hidden_size, self.moe_intermediate_size
        return self.moe_intermediate_size, self.hidden_size

    def has_indexer(self, layer: int) -> bool:
        """Whether `layer` stores indexer tensors; multi-token-prediction layers always do."""
        return layer >= self.num_hidden_layers or self.indexer_types[layer] == "full"

    @classmethod
    def from_dict(cls, config: object) -> Geometry:
        """Reads the geometry from a parsed `config.json`.

        Raises:
            ConfigError: Not a GLM-MoE-DSA model, a variant that encoder and server would compute differently, or a size
                is missing, not a positive integer, or inconsistent.
        """
        if not isinstance(config, Mapping):
            raise ConfigError("config.json", f"expected an object, found {type(config).__name__}", _FIX)
        if config.get("model_type") != MODEL_TYPE:
            raise ConfigError(
                "config.json: model_type",
                f"expected {MODEL_TYPE!r}, found {config.get('model_type')!r}",
                "vqserve takes GLM-MoE-DSA models only",
            )
        sizes = {key: _integer(config, key, least=1) for key in _SIZES}
        check_variant(config)
        if config.get("tie_word_embeddings", False) is not False:
            raise ConfigError(
                "config.json: tie_word_embeddings",
                f"expected false, found {config['tie_word_embeddings']!r}: the served model class does not tie them",
                "store lm_head.weight as a copy of model.embed_tokens.weight and set tie_word_embeddings to false",
            )
        layers, dense = sizes["num_hidden_layers"], _dense_layers(config, sizes["num_hidden_layers"])
        if sizes["num_experts_per_tok"] > sizes["n_routed_experts"]:
            raise ConfigError(
                "config.json: num_experts_per_tok",
                f"expected at most {sizes['n_routed_experts']} (all experts), found {sizes['num_experts_per_tok']}",
                _FIX,
            )
        for key in ("hidden_size", "moe_intermediate_size"):
            if sizes[key] % GROUP:
                raise ConfigError(
                    f"config.json: {key}",
                    f"expected a multiple of {GROUP}, found {sizes[key]}",
                    f"a parent of this size cannot be quantized: one scale serves {GROUP} columns",
                )
        return cls(
            **sizes,
            first_k_dense_replace=dense,
            num_nextn_predict_layers=_integer(config, "num_nextn_predict_layers", least=0, default=0),
            indexer_types=_indexer_types(config, layers),
        )


def _integer(config: Mapping[str, Any], key: str, least: int, default: int | None = None) -> int:
    found = config.get(key, default)
    if key not in config and default is None:
        raise ConfigError(f"config.json: {key}", "key is missing", _FIX)
    if found is None and default is not None:
        return default
    most = _MOST.get(key, _MOST_OTHERWISE)
    if type(found) is not int or not least <= found <= most:
        problem = f"expected an integer from {least} to {most}, found {found!r}"
        raise ConfigError(f"config.json: {key}", problem, _FIX)
    return found


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    dense = _integer(config, "first_k_dense_replace", least=0)
    if dense >= layers:
        raise ConfigError(
            "config.json: first_k_dense_replace",
            f"expected less than num_hidden_layers = {layers}, found {dense}",
            _FIX,
        )
    kinds = config.get("mlp_layer_types")
    # vLLM looks at first_k_dense_replace alone, transformers at mlp_layer_types: they must say the same.
    if kinds is not None and kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise ConfigError(
            "config.json: mlp_layer_types",
            f"expected {dense} x 'dense', {layers - dense} x 'sparse' as first_k_dense_replace says, found {kinds!r}",
            _FIX,
        )
    return dense


def _indexer_types(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """Per layer `full` or `shared`, derived as transformers does: list, else pattern, else frequency and offset."""
    kinds, pattern = config.get("indexer_types"), config.get("index_topk_pattern")
    where = "config.json: indexer_types"
    if kinds is None and pattern is not None:
        where = "config.json: index_topk_pattern"
        kinds = (
            [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
            if isinstance(pattern, str)
            else pattern
        )
    if kinds is None:
        every = _integer(config, "index_topk_freq", least=1, default=1)
        offset = _integer(config, "index_skip_topk_offset", least=0, default=2)
        kinds = ["full" if max(layer - offset + 1, 0) % every == 0 else "shared" for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in ("full", "shared") for kind in kinds):
        raise ConfigError(where, f"expected 'full' or 'shared' for each of {layers} layers, found {kinds!r}", _FIX)
    if kinds[0] != "full":
        raise ConfigError(where, "the first layer is 'shared', but there is no layer before it to share with", _FIX)
    return tuple(kinds)
