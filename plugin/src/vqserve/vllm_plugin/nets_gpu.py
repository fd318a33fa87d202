"""The safety nets on vLLM's second model runner, which GPUs have: a logits processor that finds all tokens on the GPU.

Nothing here waits for the GPU. Counts are summed there, copied to the host behind the step's other work, and published
with the next step: what is read lags by one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from vqserve.settings import AntiRepetition, anti_repetition
from vqserve.vllm_plugin.counters import NAMES, STEERED, THINKING_CLOSED
from vqserve.vllm_plugin.nets import admit, asked_of, counters_of, marks_of
from vqserve.vllm_plugin.repetition import penalise

_LATE = 8
"""Tokens into its answer by which a model has to open its thinking, if the prompt did not, to be counted."""


class SafetyNets(LogitsProcessor):
    """vLLM's `LogitsProcessor` for the anti-repetition penalty; also counts thinking that its budget closes."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        admit(sampling_params)

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self._states, device = req_states, req_states.device
        self._window = (anti_repetition() or AntiRepetition(0.0)).window
        self._marks = marks_of(vllm_config)
        self._counters = counters_of(vllm_config)
        slots = req_states.max_num_reqs
        self._strength_np = np.zeros(slots, np.float32)
        self._lengths_np = np.ones((slots, 2), np.int32)  # min_length and window
        self._budget_np = np.full(slots, -1, np.int64)
        self._stale = True
        self.apply_staged_writes()
        self._counted = torch.zeros(len(NAMES), dtype=torch.int64, device=device)
        self._read = torch.zeros(len(NAMES), dtype=torch.int64, pin_memory=device.type == "cuda")

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        setting, budget = asked_of(sampling_params), sampling_params.thinking_token_budget
        self._strength_np[req_idx] = setting.strength
        self._lengths_np[req_idx] = setting.min_length, setting.window
        self._budget_np[req_idx] = -1 if budget is None else budget
        self._stale = True
        return setting.strength > 0

    def apply_staged_writes(self) -> None:
        if self._stale:
            self._strength = self._on_device(self._strength_np, torch.float32)
            self._lengths = self._on_device(self._lengths_np, torch.int32)
            self._budget = self._on_device(self._budget_np, torch.int64)
            self._stale = False

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        for counter, number in enumerate(self._read.tolist()):
            self._counters.set(counter, number)
        penalised = bool((self._strength_np[ctx.idx_mapping_np] > 0).any())
        budget = self._closing(ctx)
        if not penalised and budget is None:
            return logits
        slots = ctx.expanded_idx_mapping.long()
        sampled = ctx.pos + 1 >= self._states.total_len.gpu[slots]  # not while a prompt comes in chunks
        if penalised:
            recent = self._recent(slots, ctx)
            steered = penalise(logits, recent, self._strength[slots], self._lengths[slots, 0])
            self._counted[STEERED] += (steered & sampled).sum()
        if budget is not None:
            self._counted[THINKING_CLOSED] += (self._closed(slots, ctx, budget) & sampled).sum()
        self._read.copy_(self._counted, non_blocking=True)
        return logits

    def _on_device(self, values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return async_tensor_h2d(values.tolist(), dtype=dtype, device=self._states.device)

    def _recent(self, slots: Tensor, ctx: LogitsContext) -> Tensor:
        """int32 [R, W], the generated tokens of the window, -1 left of them."""
        tokens, at = self._last(slots, ctx, self._window)
        first = torch.maximum(self._states.prompt_len.gpu[slots], ctx.pos + 1 - self._lengths[slots, 1])
        return torch.where(at >= first[:, None], tokens, -1)

    def _last(self, slots: Tensor, ctx: LogitsContext, count: int) -> tuple[Tensor, Tensor]:
        """int32 [R, count], the last tokens of each row, drafts included, and the positions where they stand."""
        at = ctx.pos[:, None] + 1 - count + torch.arange(count, device=ctx.pos.device)
        committed = self._states.all_token_ids.gpu
        tokens = committed[slots[:, None], at.clamp(min=0)]
        # Drafts are committed later; until then they stand in the rows of their own request, after the last token.
        row = torch.arange(len(slots), device=slots.device) - ctx.expanded_local_pos
        drafted = at - self._states.total_len.gpu[slots][:, None]
        drafts = ctx.input_ids[(row[:, None] + drafted + 1).clamp(0, len(ctx.input_ids) - 1)]
        return torch.where(drafted >= 0, drafts.to(tokens.dtype), tokens), at

    def _closing(self, ctx: LogitsContext) -> int | None:
        """The longest thinking budget among those that this step may exhaust, as far as the host knows; else None."""
        if self._marks is None:
            return None
        budget = self._budget_np[ctx.idx_mapping_np]
        thought = ctx.seq_lens_upper_bound_np - self._states.prompt_len.np[ctx.idx_mapping_np] - budget
        due = budget[(budget >= 0) & (thought >= 0) & (thought <= _LATE)]
        return int(due.max()) if len(due) else None

    def _closed(self, slots: Tensor, ctx: LogitsContext, longest: int) -> Tensor:
        """bool [R]: whether vLLM closes the thinking with this token: opened a budget's tokens ago, and still open."""
        assert self._marks is not None
        tokens, at = self._last(slots, ctx, longest + 1)
        budget = self._budget[slots]
        opened = (ctx.pos - budget)[:, None]
        starts = (tokens == self._marks.start) & (at >= 0)
        ends = (tokens == self._marks.end) & (at > opened)
        known = (budget >= 0) & (budget <= longest)
        return (starts & (at == opened)).any(1) & ~((starts & (at > opened)) | ends).any(1) & known
