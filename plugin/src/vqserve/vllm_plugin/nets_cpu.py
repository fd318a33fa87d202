"""The safety nets on vLLM's first model runner, which CPUs have: a logits processor that is given Python lists."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from vqserve.settings import AntiRepetition
from vqserve.vllm_plugin.counters import STEERED, THINKING_CLOSED
from vqserve.vllm_plugin.nets import Marks, admit, asked_of, counters_of, marks_of
from vqserve.vllm_plugin.repetition import penalise, repeats


class SafetyNets(LogitsProcessor):
    """vLLM's `LogitsProcessor` for the anti-repetition penalty; also counts thinking that its budget closes."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        admit(sampling_params)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, _Request] = {}
        self._marks = marks_of(vllm_config)
        self._counters = counters_of(vllm_config)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._requests, batch_update, self._caught)

    def apply(self, logits: Tensor) -> Tensor:
        closed = steered = 0
        for row, request in self._requests.items():
            closed += request.closes()
            steered += request.steer(logits[row : row + 1])
        self._counters.add(THINKING_CLOSED, closed)
        self._counters.add(STEERED, steered)
        return logits

    def _caught(self, params: SamplingParams, prompt: list[int] | None, out: list[int]) -> _Request | None:
        setting = asked_of(params)
        budget = None if prompt is None else params.thinking_token_budget
        if setting.strength == 0 and budget is None:
            return None
        return _Request(setting, budget, self._marks, prompt or [], out)


class _Request:
    """A request that a net may catch.

    Args:
        setting: What it asks of the penalty.
        budget: Of its thinking, in tokens.
        marks: What opens and closes thinking.
        prompt: Its prompt's tokens.
        out: Its generated tokens: vLLM's own list, which grows.
    """

    def __init__(
        self, setting: AntiRepetition, budget: int | None, marks: Marks | None, prompt: list[int], out: list[int]
    ) -> None:
        self._setting, self._budget, self._marks, self._prompt, self._out = setting, budget, marks, prompt, out
        self._strength = torch.tensor([setting.strength])
        self._min_length = torch.tensor([setting.min_length])
        # Twice the window, so that it seldom has to be moved down.
        self._room = torch.full((2 * setting.window if setting.strength else 0,), -1, dtype=torch.int32)
        self._end, self._seen = setting.window, 0

    def closes(self) -> bool:
        """Whether vLLM closes the thinking with this token: it was opened just so many tokens ago, and is open."""
        length = len(self._prompt) + len(self._out)
        if self._budget is None or self._marks is None or length <= self._budget:
            return False
        opened, begun = length - 1 - self._budget, len(self._prompt)
        token = self._prompt[opened] if opened < begun else self._out[opened - begun]
        if token != self._marks.start:
            return False
        since = [*self._prompt[opened + 1 :], *self._out[max(0, opened + 1 - begun) :]]
        return self._marks.start not in since and self._marks.end not in since

    def steer(self, logits: Tensor) -> bool:
        """Penalises what would prolong a repetition; whether that was the likeliest token."""
        if self._setting.strength == 0 or not self._out:
            return False
        recent = self._recent()
        if not repeats(recent, self._setting.min_length):
            return False
        return bool(penalise(logits, recent[None], self._strength, self._min_length))

    def _recent(self) -> Tensor:
        """int32 [W], what was generated last, after adding what is new since the last call."""
        window = self._setting.window
        new = self._out[self._seen :][-window:]
        self._seen = len(self._out)
        if self._end + len(new) > len(self._room):
            self._room[:window] = self._room[self._end - window : self._end].clone()
            self._end = window
        self._room[self._end : self._end + len(new)] = torch.tensor(new, dtype=torch.int32)
        self._end += len(new)
        return self._room[self._end - window : self._end]
