"""One vLLM engine in a process of its own: `python -m vqserve.bench.engine REQUEST RESULT`, both JSON files.

Loads a model of made-up weights from its `config.json` and measures it. What is asked for is a `Request`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

DECODE_STEPS = 64
REPEATS = 3
PROFILED_STEPS = 16


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        folder: Holds `config.json`.
        ranks: Tensor-parallel ranks.
        context: Tokens of the longest sequence.
        utilization: Share of a GPU's memory that the engine may take.
        contexts: Tokens before the first one decoded, a single stream at a time.
        batches: Streams decoded together, at the first context.
        prompts: Tokens of a prompt alone.
        engine: Further arguments of `vllm.LLM`.
    """

    folder: str
    ranks: int
    context: int
    utilization: float
    contexts: Sequence[int]
    batches: Sequence[int]
    prompts: Sequence[int]
    engine: Mapping[str, Any]


def measure(request: Request) -> dict[str, Any]:
    """Loads the model and measures it; seconds, bytes and microseconds as the names say."""
    from vllm import LLM

    begin = time.perf_counter()
    engine = LLM(
        request.folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=request.context,
        max_num_seqs=max([*request.batches, 1]),
        tensor_parallel_size=request.ranks,
        gpu_memory_utilization=request.utilization,
        enable_prefix_caching=False,
        hf_overrides={"architectures": ["GlmMoeDsaDenseForCausalLM"]},
        **request.engine,
    )
    loaded = time.perf_counter() - begin
    config = engine.llm_engine.vllm_config
    blocks, block_size = config.cache_config.num_gpu_blocks, config.cache_config.block_size
    seconds = {f"decode, context {context}": _per_token(engine, 1, context) for context in request.contexts} | {
        f"decode, batch {batch}": _per_token(engine, batch, request.contexts[0])
        for batch in request.batches
        if batch > 1
    }
    return {
        "model class": engine.collective_rpc(_model_class)[0],
        "compilation mode": str(config.compilation_config.mode),
        "graph mode": str(config.compilation_config.cudagraph_mode),
        "load seconds": loaded,
        "weight bytes per rank": engine.collective_rpc(_allocated),
        "KV cache tokens": (blocks or 0) * block_size,
        "seconds per step": seconds,
        "first token seconds": {str(tokens): _generate(engine, 1, tokens, 1) for tokens in request.prompts},
        "kernels": _profile(engine, request.contexts[0]),
    }


def _per_token(engine: Any, batch: int, context: int) -> float:
    """Seconds per decoded step: the difference of two lengths, so that prefill drops out."""
    long, short = _generate(engine, batch, context, DECODE_STEPS + 1), _generate(engine, batch, context, 1)
    return (long - short) / DECODE_STEPS


def _generate(engine: Any, batch: int, context: int, tokens: int) -> float:
    """Median seconds to answer `batch` random prompts."""
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    rng, times = random.Random(0), []
    for _ in range(REPEATS + 1):  # the first one warms up
        prompts = [[rng.randrange(vocabulary) for _ in range(context)] for _ in range(batch)]
        begin = time.perf_counter()
        _answer(engine, prompts, tokens)
        times.append(time.perf_counter() - begin)
    return float(median(times[1:]))


def _answer(engine: Any, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)


def _profile(engine: Any, context: int) -> dict[str, list[float]]:
    """Per kernel of the first rank: calls and microseconds per decoded step of a single stream."""
    totals = []
    for tokens in (PROFILED_STEPS + 1, 1):
        engine.collective_rpc(_start_profile)
        _answer(engine, [[1] * context], tokens)
        totals.append(engine.collective_rpc(_stop_profile)[0])
    long, short = totals
    nothing = [0.0, 0.0]
    steps = {
        name: [(all_ - prefill) / PROFILED_STEPS for all_, prefill in zip(found, short.get(name, nothing), strict=True)]
        for name, found in long.items()
    }
    return {name: found for name, found in steps.items() if found[1] > 0}


def _start_profile(worker: Any) -> None:
    import torch

    worker.bench_profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)
    worker.bench_profile.__enter__()


def _stop_profile(worker: Any) -> dict[str, list[float]]:
    import torch

    torch.cuda.synchronize()
    worker.bench_profile.__exit__(None, None, None)
    averages = worker.bench_profile.key_averages()
    return {each.key: [each.count, each.device_time_total] for each in averages if each.device_time_total}


def _model_class(worker: Any) -> str:
    return type(worker.model_runner.model).__name__


def _allocated(worker: Any) -> int:
    return sum(
        p.untyped_storage().nbytes() for p in {p.data_ptr(): p for p in worker.model_runner.model.parameters()}.values()
    )


if __name__ == "__main__":
    asked = Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps({"request": asdict(asked), **measure(asked)}), encoding="utf-8")
