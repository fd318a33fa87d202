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
REPEATS = 5
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

    def step(batch: int, context: int) -> float:
        return _medians(engine, batch, context, DECODE_STEPS + 1)[1]

    seconds = {f"decode, context {context}": step(1, context) for context in request.contexts} | {
        f"decode, batch {batch}": step(batch, request.contexts[0]) for batch in request.batches if batch > 1
    }
    return {
        "model class": engine.collective_rpc(_model_class)[0],
        "compilation mode": str(config.compilation_config.mode),
        "graph mode": str(config.compilation_config.cudagraph_mode),
        "load seconds": loaded,
        "weight bytes per rank": engine.collective_rpc(_allocated),
        "KV cache tokens": (blocks or 0) * block_size,
        "seconds per step": seconds,
        "first token seconds": {str(tokens): _medians(engine, 1, tokens, 1)[0] for tokens in request.prompts},
        "kernels": _profile(engine, request.contexts[0]),
    }


def _medians(engine: Any, batch: int, context: int, tokens: int) -> tuple[float, float]:
    """Of `answer` to random prompts."""
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    rng, found = random.Random(0), []
    for _ in range(REPEATS + 1):  # the first one warms up
        prompts = [[rng.randrange(vocabulary) for _ in range(context)] for _ in range(batch)]
        found.append(answer(engine, prompts, tokens))
    first, step = zip(*found[1:], strict=True)
    return median(first), median(step)


def answer(engine: Any, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, float]:
    """Has prompts answered together.

    Args:
        engine: A `vllm.LLM`.
        prompts: Of token ids.
        tokens: Of each answer.

    Returns:
        Seconds until each has its first token; and seconds per step from then on while all go on, 0 if none does.

    Raises:
        ValueError: The first of them ends before the last begins.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    parameters = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    core, begin = engine.llm_engine, time.perf_counter()
    for number, prompt in enumerate(prompts):
        core.add_request(str(number), {"prompt_token_ids": list(prompt)}, parameters)
    answered, times, all_go_on = set[str](), list[float](), True
    while core.has_unfinished_requests():
        outputs = core.step()
        answered.update(output.request_id for output in outputs)
        if outputs and all_go_on and len(answered) == len(prompts):
            times.append(time.perf_counter())
        all_go_on = all_go_on and not any(output.finished for output in outputs)
    if not times:
        raise ValueError(f"{len(prompts)} streams never decode together: the first ends before the last begins")
    return times[0] - begin, (times[-1] - times[0]) / max(len(times) - 1, 1)


def _profile(engine: Any, context: int) -> dict[str, list[float]]:
    """Per kernel of the first rank: calls and microseconds per decoded step of a single stream."""
    found = []
    for tokens in (PROFILED_STEPS + 1, 1):
        engine.collective_rpc(_start_profile)
        answer(engine, [[1] * context], tokens)
        found.append(engine.collective_rpc(_stop_profile)[0])
    long, short = found
    return decoded(long, short, PROFILED_STEPS)


def decoded(
    long: Mapping[str, Sequence[float]], short: Mapping[str, Sequence[float]], steps: int
) -> dict[str, list[float]]:
    """What each kernel does in a decode step, without the prompt: there ranks may wait long for each other.

    Args:
        long: Microseconds of each kernel's runs in a prompt and `steps` decode steps, in their order.
        short: In the prompt alone.
        steps: As above.

    Returns:
        Calls and microseconds per decode step.
    """
    calls = {name: len(found) - len(short.get(name, ())) for name, found in long.items()}
    return {
        name: [calls[name] / steps, sum(found[-calls[name] :]) / steps]
        for name, found in long.items()
        if calls[name] > 0
    }


def _start_profile(worker: Any) -> None:
    import torch

    worker.bench_profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)
    worker.bench_profile.__enter__()


def _stop_profile(worker: Any) -> dict[str, list[float]]:
    import torch

    torch.cuda.synchronize()
    worker.bench_profile.__exit__(None, None, None)
    found: dict[str, list[float]] = {}
    for event in sorted(worker.bench_profile.events(), key=lambda event: event.time_range.start):
        if event.device_time_total:
            found.setdefault(event.key, []).append(event.device_time_total)
    return found


def _model_class(worker: Any) -> str:
    return type(worker.model_runner.model).__name__


def _allocated(worker: Any) -> int:
    return sum(
        p.untyped_storage().nbytes() for p in {p.data_ptr(): p for p in worker.model_runner.model.parameters()}.values()
    )


if __name__ == "__main__":
    asked = Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps({"request": asdict(asked), **measure(asked)}), encoding="utf-8")
