"""The safety nets of requests, as both of vLLM's model runners need them: what a request asks for, and what to count.

vLLM has two interfaces of logits processors, one for each of its model runners: `nets_cpu` stands on that of the
CPUs', `nets_gpu` on that of the GPUs'. `vqserve serve` names one of them to vLLM where a net is configured, and none
otherwise. Closing the thinking is vLLM's own work; here a request gets the server's budget if it names none.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams

from vqserve.arguments import shortened
from vqserve.format.errors import UsageError
from vqserve.settings import AntiRepetition, anti_repetition, thinking_budget
from vqserve.vllm_plugin.counters import Counters

ARGUMENT = "anti_repetition"
"""Of `vllm_xargs`, which is `SamplingParams.extra_args`: a strength, or `STRENGTH[,MIN_LENGTH[,WINDOW]]`."""


class Marks(NamedTuple):
    """The tokens that open and close thinking."""

    start: int
    end: int


def admit(params: SamplingParams) -> None:
    """Checks what a request asks of the nets, and gives it the server's thinking budget if it has none.

    Runs where vLLM validates requests: the one place that every route passes, in the API server, before the engine has
    its copy of the parameters.

    Raises:
        ValueError: It asks for something that cannot be; vLLM answers 400.
    """
    asked_of(params)
    if params.thinking_token_budget is None:
        params.thinking_token_budget = thinking_budget()


def asked_of(params: SamplingParams) -> AntiRepetition:
    """What a request wants of the anti-repetition penalty: its own words, or else the server's.

    Raises:
        ValueError: It says something that cannot be.
    """
    server = anti_repetition() or AntiRepetition(0.0)
    asked = (params.extra_args or {}).get(ARGUMENT)
    if asked is None:
        return server
    try:
        text = f"{asked:.6f}" if isinstance(asked, int | float) and not isinstance(asked, bool) else str(asked)
        setting = AntiRepetition.parse(text, server)
    except UsageError as error:
        raise ValueError(f"vllm_xargs.{ARGUMENT} = {shortened(repr(asked))}: {error}; 0 turns it off") from error
    if setting.window > server.window:
        problem = f"the window is at most this server's, {server.window}"
        raise ValueError(f"vllm_xargs.{ARGUMENT} = {asked!r}: {problem}; ask for less, or leave it out")
    return setting


def marks_of(config: VllmConfig) -> Marks | None:
    """What opens and closes thinking; None if it is not one token each, and then nobody counts."""
    reasoning = config.reasoning_config
    if reasoning is None or not reasoning.enabled:
        return None
    start, end = reasoning.reasoning_start_token_ids, reasoning.natural_reasoning_end_token_ids
    return Marks(start[0], end[0]) if start and end and len(start) == len(end) == 1 else None


def counters_of(config: VllmConfig) -> Counters:
    """Where this process counts: all ranks of an engine sample the same tokens, so only the first one's are seen."""
    parallel = config.parallel_config
    first = parallel.rank % parallel.tensor_parallel_size == 0
    return Counters(parallel.data_parallel_index, None if first else "")
