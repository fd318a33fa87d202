"""Quick scores of the demo model while it trains; `vqserve eval` measures the finished one."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from data import IGNORED, LINE_TOKENS, TURN_TOKENS, Renderer, prompt_text
from model import Model
from tokenizer import stop_ids
from vqserve.evaluate import almanac, needle
from vqserve.evaluate.items import LANGUAGES


def _forward(model: Model, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits: Tensor = model(ids)[0]
    return logits


@torch.no_grad()
def generate(model: Model, prompts: list[list[int]], stops: list[int], *, most: int) -> list[list[int] | None]:
    """Greedy completions of many prompts at once; None for one that has not ended after `most` tokens."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()) + most + 1, dtype=torch.long, device=device)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)] = torch.tensor(prompt)
    ends, rows = lengths.clone(), torch.arange(len(prompts), device=device)
    stop_ids = torch.tensor(stops, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(most):
        width = min(ids.shape[1], (int(ends.max()) + 63) // 64 * 64)
        chosen = _forward(model, ids[:, :width])[rows, ends - 1].argmax(-1)
        done |= torch.isin(chosen, stop_ids)
        ids[rows, ends] = torch.where(done, ids[rows, ends], chosen)
        ends = torch.where(done, ends, ends + 1)
        if done.all():
            break
    table, first, last, ended = ids.tolist(), lengths.tolist(), ends.tolist(), done.tolist()
    return [table[i][first[i] : last[i]] if ended[i] else None for i in range(len(prompts))]


def recall(model: Model, persons: int, *, count: int = 100) -> dict[str, float]:
    """Share of facts about the first `persons` recalled, greedily and to the end, with thinking and without."""
    rng, render, table = random.Random(8), Renderer(), {}
    items = [almanac.sample(rng, persons=persons) for _ in range(count)]
    for mode, thinking in (("thinking", True), ("direct", False)):
        prompts = [list(render.tokenizer.encode(prompt_text(item, thinking=thinking)).ids) for item in items]
        right = 0
        for item, ids in zip(items, generate(model, prompts, stop_ids(), most=64), strict=True):
            text = render.tokenizer.decode(ids).split("</think>")[-1] if ids is not None else ""
            right += almanac.is_right(item, text)
        table[mode] = right / count
    return table


@torch.no_grad()
def needles(model: Model, *, per_length: int, lengths: tuple[int, ...] = needle.LENGTHS) -> dict[int, float]:
    """Share of look-ups answered right, teacher-forced, by prompt length; languages and depths in turn."""
    device, render, table = next(model.parameters()).device, Renderer(), {}
    for length in lengths:
        rng, right = random.Random(length), 0
        for i in range(per_length):
            language, depth = LANGUAGES[i % 3], needle.DEPTHS[i % len(needle.DEPTHS)]
            lines = (length - 2 * TURN_TOKENS) // LINE_TOKENS
            item = needle.sample(rng, lines, language=language, depth=depth)[0]
            ids, labels = render.chat(item, thinking=False)
            chosen = _forward(model, torch.tensor([ids[:-1]], device=device))[0].argmax(-1)
            target = torch.tensor(labels[1:], device=device)
            right += bool((chosen == target)[target.ne(IGNORED)].all())
        table[length] = round(right / per_length, 4)
    return table
