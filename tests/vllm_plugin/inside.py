"""What the tests do inside a process that has imported vLLM: call these through `EngineProcess`."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from random_checkpoint import read_tensors
from random_parent import write_weights
from vqserve.format.errors import UsageError
from vqserve.format.flat import BUFFERS
from vqserve.format.names import parse_expert_tensor
from vqserve.settings import SPINE

Stream = list[tuple[str, Tensor]]


def rotary_error(shape: tuple[int, ...]) -> float:
    """How far vLLM's CPU operator is from its own torch code, for a query of `shape`, the first axis being tokens."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    with set_current_vllm_config(VllmConfig()):
        rotary = RotaryEmbedding(64, 64, 4096, 10000.0, False, torch.float32)
    generator = torch.Generator().manual_seed(0)
    positions, query = torch.arange(shape[0]), torch.randn(shape, generator=generator)
    key = torch.randn(shape[0], 64, generator=generator)
    wanted, _ = rotary.forward_native(positions, query.clone(), key.clone())
    found, _ = rotary.forward_cpu(positions, query.clone(), key.clone())
    return float((wanted - found).abs().max())


def create_config(folder: Path, **options: Any) -> Any:
    """vLLM's configuration for a checkpoint; nothing is loaded."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(folder), max_model_len=64, **options).create_engine_config()


def load(folder: Path, change: Callable[..., Stream], *arguments: str, **options: Any) -> list[str]:
    """Loads the tensors of a checkpoint, changed, as vLLM's loader would; returns the methods of the model's layers."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

    config = create_config(folder, dtype="bfloat16", **options)
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as meeting:
        init_distributed_environment(1, 0, f"file://{meeting}/point", 0, "gloo")
        initialize_model_parallel(1, 1)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = initialize_model(config)
            model.load_weights(iter(change(list(read_tensors(folder).items()), *arguments)))
            process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        finally:
            torch.set_default_dtype(default)
            cleanup_dist_env_and_memory()
    methods = ((name, getattr(module, "quant_method", None)) for name, module in model.named_modules())
    return [f"{name} {type(method).__name__}" for name, method in methods if method is not None]


def unchanged(stream: Stream) -> Stream:
    return stream


def without(stream: Stream, name: str) -> Stream:
    return [(other, tensor) for other, tensor in stream if other != name]


def without_layer(stream: Stream, prefix: str) -> Stream:
    return [(name, tensor) for name, tensor in stream if not name.startswith(prefix)]


def twice(stream: Stream, name: str) -> Stream:
    return [*stream, *((other, tensor) for other, tensor in stream if other == name)]


def cut(stream: Stream, name: str) -> Stream:
    return [(other, tensor[:-1] if other == name else tensor) for other, tensor in stream]


def cast(stream: Stream, name: str) -> Stream:
    return [(other, tensor.float() if other == name else tensor) for other, tensor in stream]


def copied(stream: Stream, name: str, to: str) -> Stream:
    return [*stream, *((to, tensor) for other, tensor in stream if other == name)]


def reload_from(folder: Path, prompt: list[int], engine: Any) -> Tensor:
    """The logits of the first answer's token after the engine has taken its weights from another checkpoint."""
    from vllm import SamplingParams

    engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
    [output] = engine.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    [row] = output.outputs[0].logprobs
    return torch.tensor([row[token].logprob for token in sorted(row)])


def why_dequantized(dtype: str, setting: str | None) -> str | None:
    """What the plugin says with `SPINE` set so, an error included."""
    from vqserve.vllm_plugin import linear

    with patch.dict(os.environ):
        os.environ.pop(SPINE, None)
        if setting:
            os.environ[SPINE] = setting
        try:
            return linear.why_dequantized(getattr(torch, dtype))
        except UsageError as error:
            return str(error)


def remove_tensor(folder: Path, name: str) -> None:
    """Removes a tensor from a checkpoint's files and index, and leaves the rest as it is."""
    tensors = read_tensors(folder)
    del tensors[name]
    for file in folder.glob("*.safetensors"):
        file.unlink()
    write_weights(folder, tensors, 1)


def held_bytes(engine: Any) -> list[dict[str, int]]:
    """Bytes that each rank holds of experts and 4-bit spine, by `_kind`."""
    held: list[dict[str, int]] = engine.collective_rpc(_held_bytes)
    return held


def stored_bytes(folder: Path, experts: Iterable[int] | None = None) -> dict[str, int]:
    """Bytes of a checkpoint's experts, of these only if any are named, and of its spine, by `_kind`."""
    mine = None if experts is None else set(experts)
    tensors = read_tensors(folder).items()
    parsed = ((name, tensor, parse_expert_tensor(name)) for name, tensor in tensors)
    return _sum((name, t.nbytes) for name, t, part in parsed if mine is None or part is None or part.expert in mine)


def _held_bytes(worker: Any) -> dict[str, int]:
    # Of the storage: a view of half of the bytes would hold them all.
    parameters = worker.model_runner.model.named_parameters()
    return _sum((name, parameter.untyped_storage().nbytes()) for name, parameter in parameters)


def _sum(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for name, size in sizes:
        kind = _kind(name)
        if kind is not None:
            total[kind] += size
    return dict(total)


def _kind(name: str) -> str | None:
    """What a tensor of the checkpoint, or a parameter of the model, is a part of; None if it does not matter here."""
    stem, _, part = name.rpartition(".")
    if ".experts." in name:
        return None if "codebook" in part else part.rpartition("_")[2]
    # Zeros are all the same and not kept; dense attention loads no indexer.
    if part not in ("qweight", "scales") or ".indexer." in name:
        return None
    whole = stem.endswith(("fused_qkv_a_proj", "q_a_proj", "kv_a_proj_with_mqa"))
    return "spine of every rank" if whole else "spine"


def spine_weights(engine: Any) -> list[dict[str, Tensor]]:
    """The weights [N, K] that each rank's dequantized layers multiply by."""
    weights: list[dict[str, Tensor]] = engine.collective_rpc(_spine_weights)
    return weights


def _spine_weights(worker: Any) -> dict[str, Tensor]:
    from vqserve.vllm_plugin.linear import DequantizedLinearMethod

    model, weights = worker.model_runner.model, {}
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, DequantizedLinearMethod):
            # By a product with the identity, whose sums have one term: vLLM may keep the weights in any form.
            one = torch.eye(layer.input_size_per_partition, dtype=worker.model_config.dtype)
            weights[name] = method.apply(layer, one).t().contiguous()
    return weights


def collectives(engine: Any) -> list[str]:
    """What each rank sums over ranks with: gloo, or vLLM's own code for shared memory."""
    used: list[str] = engine.collective_rpc(_collectives)
    return used


def _collectives(worker: Any) -> str:
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    communicator: Any = group.device_communicator
    module = communicator.dist_module
    return torch.distributed.get_backend(group.device_group) if module is torch.distributed else type(module).__name__


def check_operator(seed: int) -> None:
    """torch's own checks of a custom operator (schema, fake implementation, dispatch), and its result."""
    from random_experts import GEOMETRY, random_experts
    from vqserve.kernels.experts import codeword_table
    from vqserve.kernels.vq_moe.cpu import TabledExperts, moe
    from vqserve.vllm_plugin import ops

    experts, generator = random_experts(seed), torch.Generator().manual_seed(seed)
    x = torch.randn(5, GEOMETRY.hidden_size, generator=generator).bfloat16()
    weights, ids = torch.rand(5, 2, generator=generator), torch.randint(8, (5, 2), generator=generator)
    words = codeword_table(experts.codebooks, x.device)
    buffers = [experts.buffers[name] for name in BUFFERS]
    arguments = (
        x,
        weights,
        ids.int(),
        buffers,
        words,
        "".join(experts.codebooks),
        ops.add_layout(experts.layout),
        None,
    )
    torch.library.opcheck(torch.ops.vqserve.moe.default, arguments)
    tabled = TabledExperts(experts.layout, experts.buffers, experts.codebooks)
    assert torch.equal(torch.ops.vqserve.moe(*arguments), moe(x, weights, ids, tabled))


def register_again() -> tuple[str, int]:
    """The plugin's configuration class, and how often its name is listed after a second registration."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
    from vllm.plugins import load_general_plugins

    from vqserve.vllm_plugin import register

    load_general_plugins()
    register()
    return get_quantization_config("vqserve").__name__, QUANTIZATION_METHODS.count("vqserve")


def memory_of_ranks(engine: Any) -> list[tuple[int, int, int]]:
    """Bytes that each rank holds of weights, of KV cache per token, and of KV cache in all."""
    held: list[tuple[int, int, int]] = engine.collective_rpc(_memory_of_rank)
    return held


def _memory_of_rank(worker: Any) -> tuple[int, int, int]:
    runner = worker.model_runner
    [blocks] = {cache.shape[0] for cache in runner.kv_caches}
    cached = sum(_storages(runner.kv_caches).values())
    weights = _weight_bytes(runner.model, set(_storages(runner.kv_caches)))
    return weights, cached // (blocks * worker.vllm_config.cache_config.block_size), cached


def _storages(tensors: Iterable[object]) -> dict[int, int]:
    """Bytes of every storage by its address, once, whatever shares it."""
    storages = (tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _weight_bytes(model: torch.nn.Module, others: set[int]) -> int:
    """Bytes of all tensors of a model but `others`, and of the copies that oneDNN keeps outside of torch."""
    from vllm._custom_ops import CPUDNNLGEMMHandler

    held: dict[int, int] = {}
    packed = 0
    for module in model.modules():
        # vLLM keeps the packed weight where only the closure of the layer's product can see it.
        cells = getattr(vars(module).get("cpu_linear"), "__closure__", None) or ()
        values = [cell.cell_contents for cell in cells]
        held |= _storages([*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values()])
        held |= _storages(values)
        elements = [value.n * value.k for value in values if isinstance(value, CPUDNNLGEMMHandler)]
        packed += sum(elements) * next(model.parameters()).element_size()
    return packed + sum(size for address, size in held.items() if address not in others)
