"""Which tensors a checkpoint holds: names, dtypes, shapes, and how tensor parallelism cuts them.

The first axis of every expert tensor is its tensor-parallel axis, so the shard of a rank is one contiguous slice:
rows for gate_proj and up_proj, groups of 128 columns for down_proj.

    gate_proj, up_proj   codes u8 [R, C/d]           refinement u8 [R, C/d/2]           scales f16 [R, C/128]
    down_proj            codes u8 [C/128, R, 128/d]  refinement u8 [C/128, R, 128/d/2]  scales f16 [C/128, R]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vqserve.format.config import PROJECTIONS, QuantConfig, Spine, VQModule
from vqserve.format.errors import ConfigError, UsageError
from vqserve.format.geometry import Geometry
from vqserve.format.names import codebook_name, expert_tensor, parse_experts_module
from vqserve.format.tiers import GROUP, Tier

DTYPE_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4}
"""Bytes per element of every safetensors dtype that a checkpoint may hold."""

FLOATS = ("BF16", "F16", "F32")

SPINE_COLUMNS = GROUP
SPINE_ROWS = 64
"""A linear layer goes to 4 bit if its in-features are a multiple of the one and its out-features of the other."""

_VOCABULARY_BLOCK = 64
"""vLLM pads the vocabulary to a multiple of this before it splits it."""

_FUSED = (("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"))
"""Linear layers that vLLM fuses into one: both in 4 bit or neither."""


@dataclass(frozen=True)
class TensorSpec:
    """What a checkpoint must hold under a name.

    Attributes:
        dtype: Safetensors dtype, e.g. `U8`.
        shape: Exact shape.
        other_dtypes: Dtypes taken as well; only tensors kept from the parent have any.
        required: False for tensors that may be absent (the multi-token-prediction layer).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    other_dtypes: tuple[str, ...] = ()
    required: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return DTYPE_BYTES[self.dtype] * _product(self.shape)


def plane_shape(tier: Tier, proj: str, part: str, rows: int, columns: int) -> tuple[int, ...]:
    """Stored shape of `part` (codes, refinement or scales) of a projection of [rows, columns] weights."""
    if part == "scales":
        return (columns // GROUP, rows) if proj == "down_proj" else (rows, columns // GROUP)
    width = tier.code_bytes if part == "codes" else tier.refinement_bytes
    return (columns // GROUP, rows, width(GROUP)) if proj == "down_proj" else (rows, width(columns))


def expert_specs(module: VQModule, geometry: Geometry) -> Iterator[TensorSpec]:
    """The codes, refinements and scales of every expert of `module`."""
    for expert in range(module.experts):
        for proj in PROJECTIONS:
            tier = module.tier(expert, proj)
            rows, columns = geometry.expert_shape(proj)
            for part, dtype in (("codes", "U8"), ("refinement", "U8"), ("scales", "F16")):
                if part != "refinement" or tier.refinement_rows:
                    name = expert_tensor(module.name, expert, proj, part)
                    yield TensorSpec(name, dtype, plane_shape(tier, proj, part, rows, columns))


def codebook_specs(module: VQModule) -> Iterator[TensorSpec]:
    """The codebooks of exactly the tiers that `module` uses."""
    for tier in module.used_tiers():
        yield TensorSpec(codebook_name(module.name, tier.id), "F16", (tier.base_rows, tier.d))
        if tier.refinement_rows:
            yield TensorSpec(
                codebook_name(module.name, tier.id, refinement=True), "F16", (tier.refinement_rows, tier.d)
            )


def vq_specs(config: QuantConfig, geometry: Geometry) -> Iterator[TensorSpec]:
    """All tensors of the vector-quantized modules.

    Raises:
        ConfigError: A module is not one of the model's, or has another number of experts.
    """
    for module in config.modules:
        layer, where = parse_experts_module(module.name), f"config.json: quantization_config: {module.name}"
        if layer not in geometry.moe_layers and layer not in geometry.mtp_layers:
            raise ConfigError(
                where,
                f"expected routed experts in layers {geometry.moe_layers.start}..{geometry.mtp_layers.stop - 1} only",
                "re-encode the parent",
            )
        if module.experts != geometry.n_routed_experts:
            raise ConfigError(
                f"{where}.tiers",
                f"expected n_routed_experts = {geometry.n_routed_experts} letters, found {module.experts}",
                "re-encode the parent",
            )
        yield from expert_specs(module, geometry)
        yield from codebook_specs(module)


def gptq_specs(name: str, rows: int, columns: int) -> Iterator[TensorSpec]:
    """The 4-bit tensors of the linear layer `name` of [rows, columns] weights."""
    yield TensorSpec(f"{name}.qweight", "I32", (columns // 8, rows))
    yield TensorSpec(f"{name}.scales", "BF16", (columns // GROUP, rows))
    yield TensorSpec(f"{name}.qzeros", "I32", (columns // GROUP, rows // 8))


def spine_specs(spine: Spine | None, geometry: Geometry) -> Iterator[TensorSpec]:
    """All tensors of the 4-bit linear layers.

    Raises:
        ConfigError: A module cannot be stored in 4 bit, or only one of two fused ones is listed.
    """
    where, listed = "config.json: quantization_config.spine.modules", set(spine.modules if spine else ())
    shapes = spine_shapes(geometry)
    for name in spine.modules if spine else ():
        if name not in shapes:
            raise ConfigError(where, f"{name} is not a linear layer of this model's that 4 bit can store", "remove it")
        for pair in _FUSED:
            stem, _, leaf = name.rpartition(".")
            for other in pair:
                if leaf in pair and f"{stem}.{other}" not in listed:
                    raise ConfigError(
                        where, f"{name} is listed, {stem}.{other} is not", "list both or neither: they are fused"
                    )
        yield from gptq_specs(name, *shapes[name])


def spine_shapes(geometry: Geometry) -> dict[str, tuple[int, int]]:
    """Rows and columns of every linear layer that can be stored in 4 bit, multi-token-prediction layers included."""
    return {
        name: shape
        for layer in (*range(geometry.num_hidden_layers), *geometry.mtp_layers)
        for name, shape in _layer_spine_shapes(geometry, layer).items()
    }


def spine_modules(geometry: Geometry) -> tuple[str, ...]:
    """The linear layers that an encoder stores in 4 bit: `spine_shapes` without multi-token-prediction layers."""
    return tuple(name for layer in range(geometry.num_hidden_layers) for name in _layer_spine_shapes(geometry, layer))


def _layer_spine_shapes(geometry: Geometry, layer: int) -> dict[str, tuple[int, int]]:
    fits = {
        name: (rows, columns)
        for name, (rows, columns) in _layer_linears(geometry, layer).items()
        if rows % SPINE_ROWS == 0 and columns % SPINE_COLUMNS == 0
    }
    for name in list(fits):
        stem, _, leaf = name.rpartition(".")
        if any(f"{stem}.{other}" not in fits for pair in _FUSED if leaf in pair for other in pair):
            del fits[name]
    return fits


def _layer_linears(geometry: Geometry, layer: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of the linear layers that the 4-bit rule considers (kv_b_proj is expanded to bf16 at load)."""
    stem, hidden, heads = f"model.layers.{layer}", geometry.hidden_size, geometry.num_attention_heads
    linears = {
        f"{stem}.self_attn.q_a_proj": (geometry.q_lora_rank, hidden),
        f"{stem}.self_attn.q_b_proj": (heads * geometry.qk_head_dim, geometry.q_lora_rank),
        f"{stem}.self_attn.kv_a_proj_with_mqa": (geometry.kv_lora_rank + geometry.qk_rope_head_dim, hidden),
        f"{stem}.self_attn.o_proj": (hidden, heads * geometry.v_head_dim),
    }
    if geometry.has_indexer(layer):
        rows = geometry.index_n_heads * geometry.index_head_dim
        linears[f"{stem}.self_attn.indexer.wq_b"] = (rows, geometry.q_lora_rank)
    dense = layer < geometry.first_k_dense_replace
    mlp = f"{stem}.mlp" if dense else f"{stem}.mlp.shared_experts"
    width = geometry.intermediate_size if dense else geometry.shared_intermediate_size
    linears[f"{mlp}.gate_proj"] = linears[f"{mlp}.up_proj"] = (width, hidden)
    linears[f"{mlp}.down_proj"] = (hidden, width)
    return linears


def parent_specs(geometry: Geometry, dtype: str = "BF16") -> dict[str, TensorSpec]:
    """All tensors of the unquantized parent: one tensor per expert and projection, un-fused linear layers.

    Args:
        geometry: The model's sizes.
        dtype: The parent's own float dtype; the router's bias is F32 whatever this is.
    """
    hidden, vocab = geometry.hidden_size, geometry.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(geometry.num_hidden_layers):
        shapes.update(_layer_shapes(geometry, layer))
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    specs = {name: _kept(name, shape, dtype) for name, shape in shapes.items()}
    for layer in geometry.mtp_layers:
        stem = f"model.layers.{layer}"
        extra: dict[str, tuple[int, ...]] = {
            f"{stem}.eh_proj.weight": (hidden, 2 * hidden),
            f"{stem}.enorm.weight": (hidden,),
            f"{stem}.hnorm.weight": (hidden,),
            f"{stem}.shared_head.norm.weight": (hidden,),
            f"{stem}.shared_head.head.weight": (vocab, hidden),
            f"{stem}.embed_tokens.weight": (vocab, hidden),
        }
        for name, shape in {**_layer_shapes(geometry, layer), **extra}.items():
            specs[name] = _kept(name, shape, dtype, required=False)
    return specs


def _layer_shapes(geometry: Geometry, layer: int) -> dict[str, tuple[int, ...]]:
    stem, hidden, heads = f"model.layers.{layer}", geometry.hidden_size, geometry.num_attention_heads
    shapes: dict[str, tuple[int, ...]] = {
        f"{stem}.input_layernorm.weight": (hidden,),
        f"{stem}.post_attention_layernorm.weight": (hidden,),
        f"{stem}.self_attn.q_a_layernorm.weight": (geometry.q_lora_rank,),
        f"{stem}.self_attn.kv_a_layernorm.weight": (geometry.kv_lora_rank,),
        f"{stem}.self_attn.kv_b_proj.weight": (
            heads * (geometry.qk_nope_head_dim + geometry.v_head_dim),
            geometry.kv_lora_rank,
        ),
    }
    shapes.update({f"{name}.weight": shape for name, shape in _layer_linears(geometry, layer).items()})
    if geometry.has_indexer(layer):
        indexer = f"{stem}.self_attn.indexer"
        shapes[f"{indexer}.wk.weight"] = (geometry.index_head_dim, hidden)
        shapes[f"{indexer}.k_norm.weight"] = shapes[f"{indexer}.k_norm.bias"] = (geometry.index_head_dim,)
        shapes[f"{indexer}.weights_proj.weight"] = (geometry.index_n_heads, hidden)
    if layer >= geometry.first_k_dense_replace:
        experts = geometry.n_routed_experts
        shapes[f"{stem}.mlp.gate.weight"] = (experts, hidden)
        shapes[f"{stem}.mlp.gate.e_score_correction_bias"] = (experts,)
        for expert in range(experts):
            for proj in PROJECTIONS:
                name = expert_tensor(f"{stem}.mlp.experts", expert, proj, "weight")
                shapes[name] = geometry.expert_shape(proj)
    return shapes


def _kept(name: str, shape: tuple[int, ...], dtype: str, required: bool = True) -> TensorSpec:
    first = "F32" if name.endswith("e_score_correction_bias") else dtype
    return TensorSpec(name, first, shape, tuple(other for other in FLOATS if other != first), required)


def float_dtype(config: Mapping[str, Any]) -> str:
    """The safetensors name of the dtype that a parsed `config.json` states; bfloat16 if it states none.

    Raises:
        ConfigError: The dtype is not one of bfloat16, float16, float32.
    """
    stated = next(found for found in (config.get("dtype"), config.get("torch_dtype"), "bfloat16") if found is not None)
    known = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    if not isinstance(stated, str) or stated not in known:
        raise ConfigError(
            "config.json: dtype", f"expected one of {', '.join(known)}, found {stated!r}", "convert the parent first"
        )
    return known[stated]


def checkpoint_specs(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """All tensors of a checkpoint by name, from its parsed `config.json`.

    Raises:
        ConfigError: The configuration is not valid, or does not fit the model's geometry.
    """
    geometry = Geometry.from_dict(config)
    quant = QuantConfig.from_dict(config.get("quantization_config"))
    specs = parent_specs(geometry, float_dtype(config))
    for spec in (*vq_specs(quant, geometry), *spine_specs(quant.spine, geometry)):
        specs[spec.name] = spec
    for module in quant.modules:
        for expert in range(module.experts):
            for proj in PROJECTIONS:
                del specs[expert_tensor(module.name, expert, proj, "weight")]
    for name in quant.spine.modules if quant.spine else ():
        del specs[f"{name}.weight"]
    return specs


def shard_slice(length: int, tp_rank: int, tp_size: int) -> slice:
    """The part of an expert tensor's first axis, `length` long, that belongs to a tensor-parallel rank."""
    assert length % tp_size == 0, "check_shardable comes first"
    assert 0 <= tp_rank < tp_size
    return slice(length // tp_size * tp_rank, length // tp_size * (tp_rank + 1))


def check_shardable(
    geometry: Geometry, tp_size: int, spine: Spine | None = None, *, whole_experts: bool = False
) -> None:
    """Checks that `tp_size` ranks can share the model.

    Args:
        geometry: The model's sizes.
        tp_size: How many ranks.
        spine: The layers stored in 4 bit; None if there are none.
        whole_experts: Whether the ranks share the experts out, instead of splitting each (expert parallelism).

    Raises:
        UsageError: They cannot; the message names the size that does not divide and the largest that does.
    """

    def reason(ranks: int) -> str | None:
        return _not_shardable(geometry, ranks, whole_experts) or _spine_not_shardable(geometry, ranks, spine)

    problem = reason(tp_size)
    if problem is not None:
        # No more ranks than heads, so that a number with ten digits does not take minutes.
        most = min(tp_size, geometry.num_attention_heads + 1)
        fits = max(size for size in range(1, max(most, 2)) if reason(size) is None)
        raise UsageError(f"tensor parallel size {tp_size}: {problem}; use {fits}")


def _not_shardable(geometry: Geometry, ranks: int, whole_experts: bool) -> str | None:
    if ranks < 1:
        return "expected at least 1"
    padded = -(-geometry.vocab_size // _VOCABULARY_BLOCK) * _VOCABULARY_BLOCK
    sizes = {
        "num_attention_heads": geometry.num_attention_heads,
        f"vocab_size, from {geometry.vocab_size} padded to a multiple of {_VOCABULARY_BLOCK},": padded,
        "intermediate_size": geometry.intermediate_size if geometry.first_k_dense_replace else 0,
        "the shared experts' width": geometry.shared_intermediate_size if whole_experts else 0,
    }
    for what, size in sizes.items():
        if size % ranks:
            return f"{what} = {size} is not a multiple of it"
    if whole_experts and geometry.n_routed_experts < ranks:
        return f"n_routed_experts = {geometry.n_routed_experts} is not one for each rank"
    if not whole_experts and geometry.moe_intermediate_size % (GROUP * ranks):
        return (
            f"moe_intermediate_size = {geometry.moe_intermediate_size} does not split into {ranks} parts "
            f"of whole groups of {GROUP} columns"
        )
    return None


def _spine_not_shardable(geometry: Geometry, ranks: int, spine: Spine | None) -> str | None:
    listed = set(spine.modules if spine else ())
    for name, (rows, columns) in spine_shapes(geometry).items():
        if name not in listed:
            continue
        leaf = name.rpartition(".")[2]
        if leaf in ("o_proj", "down_proj") and columns % (GROUP * ranks):
            return f"{name} has {columns} columns, which do not split into {ranks} parts of whole groups of {GROUP}"
        if leaf in ("q_b_proj", "gate_proj", "up_proj") and rows % (SPINE_ROWS * ranks):
            return f"{name} has {rows} rows, which do not split into {ranks} multiples of {SPINE_ROWS}"
    return None


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
