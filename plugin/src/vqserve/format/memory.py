"""How many bytes a model takes where vLLM 0.32 serves it, from its parsed `config.json` alone.

What a rank holds is what vLLM's model classes build (`models/deepseek_v2.py`, on CUDA with sparse attention
`deepseek_v32/`), less what its loaders drop:

- Experts lie in the plugin's flat buffers (`format.flat`): each split over the ranks, or whole ones shared out.
- Split are the embeddings and the head, by a vocabulary padded to a multiple of 64, and the layers whose outputs belong
  to heads or to an MLP's width. Whole on every rank are the query and key compressions, the indexer, router and norms.
- 4-bit layers keep `qweight` and `scales`; the zero points, all alike, are dropped.
- `kv_b_proj` is held once: the absorbed `W_UK_T` and `W_UV` of MLA are views of it, since it is not quantized.
- On CPUs the embeddings and the head are held twice: vLLM keeps them beside what it packs for oneDNN, even embeddings,
  which it never multiplies by. Only oneDNN's bfloat16 needs AVX-512: without it nothing is packed.
- Multi-token-prediction layers are not loaded, the indexer's weights only with sparse attention.

CPU weights and KV bytes, with dense attention, are held against a running vLLM by `tests/vllm_plugin/test_memory.py`;
those of CUDA are the same code's, read and not measured, and so are those of CPUs with AMX, where vLLM packs otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vqserve.format.config import QuantConfig, VQModule
from vqserve.format.flat import flat_layout
from vqserve.format.geometry import Geometry
from vqserve.format.layout import (
    DTYPE_BYTES,
    TensorSpec,
    check_shardable,
    checkpoint_specs,
    codebook_specs,
    parent_specs,
)
from vqserve.format.names import layer_of, parse_expert_tensor
from vqserve.format.tiers import GROUP, SCALE_BYTES, TIERS

Attention = Literal["dense", "sparse"]
Platform = Literal["cpu", "cuda"]
ATTENTIONS: tuple[Attention, ...] = ("dense", "sparse")

ELEMENT_BYTES = 2
"""Bytes of a weight or a cached value that is not quantized, in bfloat16 and float16; in float32, on CPUs, 4."""

SPARSE_TOKEN_BYTES = 656
"""`fp8_ds_mla`, which sparse attention caches per layer and token: 512 fp8, 4 scales in fp32, 64 rotary in bf16."""

_SPLIT = ("q_b_proj", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
_PREFILL_ROWS = 64 * 1024
"""Context tokens that vLLM's dense MLA gathers and projects up at once: its upper limit, which the default number of
sequences (1024 on GPUs from 70 GiB) reaches whatever the context."""
_INDEX_ROWS = 40
"""Keys that the indexer's prefill buffer holds per token of `--max-model-len` up to 256 Ki: 5 x (576 x 2 // 132)."""

_VOCABULARY_BLOCK = 64
_NIBBLES = 8
"""4-bit numbers in an int32."""


@dataclass(frozen=True)
class Weights:
    """Bytes of weights that one rank holds.

    Attributes:
        split: Per part, what it shares with the other ranks.
        whole: Per part, what every rank holds alike.
    """

    split: Mapping[str, int]
    whole: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.split.values()) + sum(self.whole.values())


@dataclass(frozen=True)
class Memory:
    """What one rank needs, of which only the KV cache and some buffers depend on the context.

    Attributes:
        geometry: The model's sizes.
        attention: Dense or sparse.
        platform: Where it runs; on CPUs nothing but weights and KV cache is counted here.
        ranks: Over how many ranks it is split.
        weights: What the fullest rank holds.
        reserve: Bytes for the CUDA context, NCCL and activations.
        element_bytes: Bytes of a value that is not quantized.
    """

    geometry: Geometry
    attention: Attention
    platform: Platform
    ranks: int
    weights: Weights
    reserve: int = 0
    element_bytes: int = ELEMENT_BYTES

    @property
    def token_bytes(self) -> int:
        """Bytes of KV cache per token; no rank is spared any."""
        return kv_bytes(self.geometry, self.attention, self.element_bytes)

    def buffers(self, tokens: int) -> int:
        """Bytes of the buffers that prefill works in, at a context of `tokens`."""
        if self.platform == "cpu":
            return 0
        if self.attention == "sparse":
            return _INDEX_ROWS * tokens * _index_token_bytes(self.geometry)
        heads = self.geometry.num_attention_heads // self.ranks
        latent = self.geometry.kv_lora_rank + self.geometry.qk_rope_head_dim
        expanded = heads * (self.geometry.qk_nope_head_dim + self.geometry.v_head_dim)
        return _PREFILL_ROWS * (latent + expanded) * self.element_bytes

    def needed(self, tokens: int) -> int:
        """Bytes that serving one context of `tokens` takes."""
        return self.weights.total + self.reserve + self.buffers(tokens) + tokens * self.token_bytes

    def longest_context(self, available: int) -> int:
        """The longest context, in tokens, that `available` bytes allow, at most what the model was made for."""
        fixed, each = self.needed(0), self.needed(1) - self.needed(0)
        return max(0, min((available - fixed) // each, self.geometry.max_position_embeddings))


def memory(
    config: Mapping[str, Any],
    *,
    ranks: int = 1,
    attention: Attention = "dense",
    platform: Platform = "cuda",
    reserve: int = 0,
    whole_experts: bool = False,
    dequantized_spine: bool = False,
    element_bytes: int = ELEMENT_BYTES,
    avx512: bool = True,
    specs: Mapping[str, TensorSpec] | None = None,
) -> Memory:
    """What the fullest of `ranks` ranks needs.

    Args:
        config: A parsed `config.json`, with its `quantization_config` if it has one.
        ranks: Tensor-parallel size.
        attention: Dense or sparse.
        platform: Where it runs.
        reserve: Bytes for what is neither weights nor KV cache nor prefill's buffers.
        whole_experts: Whether the ranks share the experts out (expert parallelism) instead of splitting each.
        dequantized_spine: Whether the 4-bit layers are dequantized at load, as on CPUs without AVX-512.
        element_bytes: Bytes of a value that is not quantized: 4 for a model served in float32, else 2.
        avx512: Whether a CPU has AVX-512.
        specs: What `checkpoint_specs` makes of `config`, where it is known: of a real model it takes seconds.

    Raises:
        ConfigError: The configuration is not valid.
        UsageError: The model does not split over so many ranks.
    """
    geometry, quant = Geometry.from_dict(config), _quant(config)
    check_shardable(geometry, ranks, quant.spine, whole_experts=whole_experts)
    packed_too = platform == "cpu" and (avx512 or element_bytes == DTYPE_BYTES["F32"])
    form = _Form(geometry, element_bytes, dequantized_spine, packed_too)
    if specs is None:
        specs = checkpoint_specs(config) if quant.modules else parent_specs(geometry)
    split, whole = _besides_vq(specs, quant, attention, form)
    split = Counter({part: -(-size // ranks) for part, size in split.items()})
    modules = [module for module in quant.modules if module.name in geometry.experts_modules]
    planes = [_planes(modules, geometry, rank, ranks, whole_experts) for rank in range(ranks)]
    fullest = max(planes, key=Counter.total)
    split += fullest
    whole["experts: codebooks"] = sum(spec.nbytes for module in modules for spec in codebook_specs(module))
    whole["rotary table"] = geometry.max_position_embeddings * geometry.qk_rope_head_dim * element_bytes
    weights = Weights(dict(split), {part: size for part, size in whole.items() if size})
    return Memory(geometry, attention, platform, ranks, weights, reserve, element_bytes)


def expert_bytes(config: Mapping[str, Any], rank: int, ranks: int, whole_experts: bool) -> dict[float, int]:
    """Bytes of the vector-quantized experts that a rank holds, scales included and codebooks not, by a tier's bits.

    Args:
        config: A parsed `config.json`.
        rank: Which rank.
        ranks: Tensor-parallel size.
        whole_experts: As `memory` takes it.

    Raises:
        ConfigError: The configuration is not valid.
    """
    geometry, held = Geometry.from_dict(config), Counter[float]()
    for module in _quant(config).modules:
        experts = _experts_of(rank, ranks, module.experts) if whole_experts else range(module.experts)
        share = 1 if whole_experts else ranks
        for proj, letters in module.tiers.items():
            rows, columns = geometry.expert_shape(proj)
            for letter, experts_of_tier in Counter(letters[expert] for expert in experts).items():
                tier = TIERS[letter]
                held[tier.bits] += experts_of_tier * tier.weight_bytes(rows, columns) // share
    return dict(sorted(held.items()))


def kv_bytes(geometry: Geometry, attention: Attention, element_bytes: int = ELEMENT_BYTES) -> int:
    """Bytes of KV cache per token on every rank: MLA caches one latent for all heads, so nothing is split."""
    if attention == "dense":
        return geometry.num_hidden_layers * (geometry.kv_lora_rank + geometry.qk_rope_head_dim) * element_bytes
    full = sum(map(geometry.has_indexer, range(geometry.num_hidden_layers)))
    return geometry.num_hidden_layers * SPARSE_TOKEN_BYTES + full * _index_token_bytes(geometry)


def _quant(config: Mapping[str, Any]) -> QuantConfig:
    """How the checkpoint is stored: an unquantized parent has no module and no 4-bit layer."""
    stored = config.get("quantization_config")
    return QuantConfig(()) if stored is None else QuantConfig.from_dict(stored)


def _index_token_bytes(geometry: Geometry) -> int:
    """Bytes of one key of an indexer: fp8, and an fp32 scale per 128."""
    return geometry.index_head_dim + 4 * (geometry.index_head_dim // GROUP)


@dataclass(frozen=True)
class _Form:
    """In which form weights that are not vector-quantized are held.

    Attributes:
        geometry: The model's sizes.
        element_bytes: As `memory` takes it.
        dequantized_spine: As `memory` takes it.
        packed_too: Whether embeddings and head are kept beside their packed copies.
    """

    geometry: Geometry
    element_bytes: int
    dequantized_spine: bool
    packed_too: bool


def _besides_vq(
    specs: Mapping[str, TensorSpec], quant: QuantConfig, attention: Attention, form: _Form
) -> tuple[Counter[str], Counter[str]]:
    """Bytes by part of all but the vector-quantized experts: what ranks split, in sum, and what each holds whole."""
    geometry, vq = form.geometry, {module.name for module in quant.modules}
    split: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for spec in specs.values():
        expert = parse_expert_tensor(spec.name)
        if (expert and expert.module in vq) or ".routed_experts." in spec.name:
            continue
        if layer_of(spec.name) in geometry.mtp_layers or (".indexer." in spec.name and attention == "dense"):
            continue
        into = split if spec.name.split(".")[-2] in _SPLIT else whole
        into["experts: not quantized" if expert else _part(spec.name)] += _held_bytes(spec, form)
    return split, whole


def _held_bytes(spec: TensorSpec, form: _Form) -> int:
    """Bytes of a stored tensor, over all ranks it is split over, once it is loaded."""
    stem, _, part = spec.name.rpartition(".")
    if part == "qzeros" or (form.dequantized_spine and part == "scales"):
        return 0
    elements = spec.nbytes // DTYPE_BYTES[spec.dtype]
    if part in ("qweight", "scales"):
        return elements * _NIBBLES * form.element_bytes if form.dequantized_spine else spec.nbytes
    if part == "e_score_correction_bias" or ".k_norm" in stem:
        return elements * DTYPE_BYTES["F32"]
    if stem.endswith(("embed_tokens", "lm_head")):
        padded = -(-form.geometry.vocab_size // _VOCABULARY_BLOCK) * _VOCABULARY_BLOCK
        copies = 2 if form.packed_too else 1
        return copies * padded * form.geometry.hidden_size * form.element_bytes
    return elements * form.element_bytes


def _part(name: str) -> str:
    """What a tensor that is no routed expert's counts as."""
    if ".indexer." in name:
        return "indexer"
    for part, leaf in (("embeddings", "embed_tokens"), ("lm_head", "lm_head"), ("kv_b_proj", "kv_b_proj")):
        if leaf in name:
            return part
    if ".mlp.gate." in name:
        return "router"
    if "norm." in name:
        return "norms"
    return "spine: not quantized" if name.endswith(".weight") else "spine: 4 bit"


def _planes(modules: Sequence[VQModule], geometry: Geometry, rank: int, ranks: int, whole: bool) -> Counter[str]:
    """Bytes of the vector-quantized experts' planes on one rank; ranks that split every expert hold equally many."""
    held: Counter[str] = Counter()
    for module in modules if whole or rank == 0 else ():
        experts = _experts_of(rank, ranks, module.experts) if whole else None
        for buffer, elements in flat_layout(module, geometry, experts, 1 if whole else ranks).sizes.items():
            plane = buffer.rpartition("_")[2]
            held[f"experts: {plane}"] += elements * (SCALE_BYTES if plane == "scales" else 1)
    return held


def _experts_of(rank: int, ranks: int, experts: int) -> range:
    """The experts that vLLM gives to a rank: neighbours, the first ranks one more if they do not come out even."""
    share, more = divmod(experts, ranks)
    start = rank * share + min(rank, more)
    return range(start, start + share + (rank < more))
