"""One process that answers questions with vLLM engines, one engine after the other.

Importing vLLM costs ten seconds and cannot be undone in pytest's own process, so the tests share one such process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core in this process: two imports of vLLM less
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_WAIT_POLICY": "passive",  # threads that spin for the next of many small operations take the cores from others
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM ties each engine to the first core, that of another process's too
    "OMP_NUM_THREADS": "1",
}

WITHOUT_AVX512 = {
    "PYTHONPATH": str(Path(__file__).parents[1] / "without_avx512"),
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
"""What has a process and its children take this CPU for one that ends at AVX2; set before it starts."""


HAS_4_BIT_GEMM = bool(torch.cpu.get_capabilities().get("avx512_f"))
"""Whether vLLM's library for this CPU can keep the spine packed."""


@dataclass(frozen=True)
class Answer:
    """What an engine says about one prompt.

    Attributes:
        tokens: The prompt and what was generated greedily.
        logits: fp32 [generated tokens, vocabulary], what each generated token was chosen from.
        prompt_logits: fp32 [prompt tokens - 1, vocabulary], for every prompt token but the first.
    """

    tokens: list[int]
    logits: Tensor
    prompt_logits: Tensor


@dataclass(frozen=True)
class Question:
    """Asks an engine of its own for a checkpoint.

    Attributes:
        inspect: Called with the engine after the answers; what it returns comes back too.
        options: Further arguments of `vllm.LLM`.
    """

    model: Path
    prompts: list[list[int]]
    dtype: str = "float32"
    generate: int = 8
    inspect: Callable[[Any], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


class EngineError(Exception):
    """The engine's process raised; the message is its traceback."""


class EngineProcess:
    """A process that imports vLLM, with `environment` beside `ENVIRONMENT` from its very start."""

    def __init__(self, **environment: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        with patch.dict(os.environ, ENVIRONMENT | environment):
            self._process.start()
        theirs.close()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs an importable `function` in the process.

        Raises:
            EngineError: It raised there, or the process died.
        """
        try:
            self._connection.send((function, arguments))
            done, value = self._connection.recv()
        except EOFError:
            raise EngineError("the process died") from None
        if not done:
            raise EngineError(value)
        return value

    def ask(self, question: Question) -> tuple[list[Answer], Any]:
        """The answers to all prompts, and what `inspect` returned."""
        answers: tuple[list[Answer], Any] = self.call(answer, question)
        return answers

    def stop(self) -> None:
        self._connection.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


def answer(question: Question) -> tuple[list[Answer], Any]:
    """Starts an engine and asks it; runs in the engine's process."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt

    _collect_no_imports()
    options = {
        "max_model_len": 512,
        "max_num_seqs": len(question.prompts),
        "max_logprobs": -1,
        "logprobs_mode": "raw_logits",
        "disable_log_stats": True,
        "num_gpu_blocks_override": 64,  # zeroing a gibibyte for each engine takes longer than loading its weights
        **question.options,
    }
    params = SamplingParams(
        max_tokens=question.generate, temperature=0, ignore_eos=True, logprobs=-1, prompt_logprobs=-1, detokenize=False
    )
    engine = None
    try:
        engine = LLM(str(question.model), dtype=question.dtype, **options)  # type: ignore[arg-type]
        outputs = engine.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in question.prompts], params, use_tqdm=False
        )
        return [_answer(output) for output in outputs], question.inspect(engine) if question.inspect else None
    finally:
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


@cache
def _collect_no_imports() -> None:
    """Hides what importing vLLM left from the garbage collector, for good.

    Six whole collections in an engine's life take 0.4 s each otherwise. vLLM's own calls of `freeze` and `unfreeze` do
    nothing from now on: `unfreeze` would show the imports again before the last three.
    """
    gc.collect()
    gc.freeze()
    for name in ("freeze", "unfreeze"):
        setattr(gc, name, lambda: None)


def _answer(output: Any) -> Answer:
    def dense(rows: Any) -> Tensor:
        return torch.tensor([[row[token].logprob for token in sorted(row)] for row in rows])

    [said], prompt = output.outputs, output.prompt_token_ids
    return Answer([*prompt, *said.token_ids], dense(said.logprobs), dense(output.prompt_logprobs[1:]))


def _serve(connection: Connection) -> None:
    while True:
        try:
            function, arguments = connection.recv()
            connection.send((True, function(*arguments)))
        except EOFError:
            return
        except Exception:  # noqa: BLE001 - whatever it is, the test that asked shall see it
            connection.send((False, traceback.format_exc()))
