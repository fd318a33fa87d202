"""What the tests of the safety nets do inside a process that has imported vLLM: call these through `EngineProcess`."""

from __future__ import annotations

import os
import random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from vqserve.settings import ANTI_REPETITION, THINKING_BUDGET

START, END = 1, 2
"""Tokens that open and close thinking."""


def becomes(value: object, server: str | None = "0.5,64,2048") -> str:
    """What becomes of a request's argument, an error included."""
    from vllm import SamplingParams

    from vqserve.vllm_plugin.nets import ARGUMENT, asked_of

    with patch.dict(os.environ, {ANTI_REPETITION: server or ""}):
        try:
            return str(asked_of(SamplingParams(extra_args=None if value is None else {ARGUMENT: value})))
        except ValueError as error:
            return str(error)


def budget_of(asked_for: int | None) -> int | None:
    """The thinking budget that a request leaves the API server with."""
    from vllm import SamplingParams

    from vqserve.vllm_plugin.nets_cpu import SafetyNets

    params = SamplingParams(thinking_token_budget=asked_for)
    with patch.dict(os.environ, {THINKING_BUDGET: "50"}):
        SafetyNets.validate_params(params)
    return params.thinking_token_budget


def counted(engine: Any) -> list[int]:
    """What the engine's processor counted."""
    values: list[int] = engine.collective_rpc(_counted)[0]
    return values


def _counted(worker: Any) -> list[int]:
    processors = worker.model_runner.input_batch.logitsprocs.all
    [nets] = [processor for processor in processors if type(processor).__module__ == "vqserve.vllm_plugin.nets_cpu"]
    values: list[int] = nets._counters.values()
    return values


def gpu_nets(setting: str, outputs: list[tuple[list[int], list[int]]], drafts: int, budgets: list[int | None]) -> Any:
    """What the adapter for GPUs takes from logits, here on the CPU: costs [rows, 20] and counts.

    Args:
        setting: Of the server.
        outputs: Prompt and answer of each request, the last `drafts` tokens of the answer being drafts.
        drafts: Draft tokens of every request.
        budgets: Thinking budget of each request.
    """
    from vllm import SamplingParams

    from vqserve.vllm_plugin import nets_gpu

    slots = random.sample(range(len(outputs) + 3), len(outputs))
    tokens = torch.full((len(outputs) + 3, 400), 7, dtype=torch.int32)
    total, prompt_len = torch.zeros(len(tokens), dtype=torch.int32), torch.zeros(len(tokens), dtype=torch.int32)
    rows: list[tuple[int, int, int, int]] = []  # slot, offset, position, token fed
    for slot, (prompt, out) in zip(slots, outputs, strict=True):
        whole = [*prompt, *out]
        committed = len(whole) - drafts
        tokens[slot, :committed] = torch.tensor(whole[:committed])
        total[slot], prompt_len[slot] = committed, len(prompt)
        rows += [(slot, k, committed - 1 + k, whole[committed - 1 + k]) for k in range(drafts + 1)]
    states = SimpleNamespace(
        device=torch.device("cpu"),
        max_num_reqs=len(tokens),
        all_token_ids=SimpleNamespace(gpu=tokens),
        total_len=SimpleNamespace(gpu=total),
        prompt_len=SimpleNamespace(gpu=prompt_len, np=prompt_len.numpy()),
    )
    config = SimpleNamespace(
        reasoning_config=SimpleNamespace(
            enabled=True, reasoning_start_token_ids=[START], natural_reasoning_end_token_ids=[END]
        ),
        parallel_config=SimpleNamespace(rank=0, tensor_parallel_size=1, data_parallel_index=0),
    )
    slot_of, offset, pos, fed = (torch.tensor(column) for column in zip(*rows, strict=True))
    context: Any = SimpleNamespace(
        expanded_idx_mapping=slot_of,
        idx_mapping_np=np.array(slots),
        expanded_local_pos=offset,
        input_ids=fed,
        pos=pos,
        seq_lens_upper_bound_np=np.array([int(total[slot]) for slot in slots]),
    )
    logits = torch.zeros(len(rows), 20)
    with patch.dict(os.environ, {ANTI_REPETITION: setting}):
        nets = nets_gpu.SafetyNets(config, states)  # type: ignore[arg-type]
        for slot, budget in zip(slots, budgets, strict=True):
            nets.add_request(slot, SamplingParams(thinking_token_budget=budget))
    nets.apply_staged_writes()
    logits = nets.apply(logits, context)
    nets.apply(torch.zeros(len(rows), 20), context)  # publishes what the first counted
    return -logits, nets._counters.values()
