"""KL divergence of a checkpoint from its parent: teacher-forced, over the full vocabulary, in nats per answer token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GlmMoeDsaForCausalLM, PreTrainedTokenizerBase

from vqserve.evaluate.statistics import bootstrap

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Sample:
    """One text to compare on.

    Attributes:
        stratum: What the result is broken down by, e.g. a language.
        prompt: What comes before the answer, special tokens included.
        completion: The answer; only its tokens count.
    """

    stratum: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Divergence:
    """KL(parent || model) over the answer tokens of one stratum.

    Attributes:
        tokens: How many tokens.
        mean: Mean over tokens, nats.
        low: Lower end of the mean's 95 % bootstrap interval over samples, nats.
        high: Upper end.
        window_mean: Mean over samples of each sample's mean, nats.
        median: Over tokens, nats.
        p95: 95th percentile over tokens, nats.
        p99: 99th percentile over tokens, nats.
        top1: Share of tokens where both rank the same token first.
    """

    tokens: int
    mean: float
    low: float
    high: float
    window_mean: float
    median: float
    p95: float
    p99: float
    top1: float

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Tokenized:
    index: int
    ids: list[int]
    answer: int


@torch.no_grad()
def divergence(
    parent: GlmMoeDsaForCausalLM,
    model: GlmMoeDsaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    progress: bool = False,
) -> dict[str, Divergence]:
    """Compare two models on the same texts.

    Args:
        parent: The reference distribution; same vocabulary as `model`.
        model: What is measured.
        tokenizer: Of either.
        samples: Texts of at most `index_topk` tokens: up to there sparse and dense attention are the same.
        progress: Show a bar.

    Returns:
        By stratum, and under "all" over everything.
    """
    rows = [_tokenize(tokenizer, i, sample) for i, sample in enumerate(samples)]
    divergences: dict[int, Tensor] = {}
    agreements: dict[int, Tensor] = {}
    with tqdm(total=len(rows), desc="KL", unit="text", disable=not progress) as bar:
        for batch in _batches(rows):
            expected, found = (_log_probabilities(m, batch) for m in (parent, model))
            for k, row in enumerate(batch):
                answer = slice(row.answer - 1, len(row.ids) - 1)
                p, q = expected[k, answer], found[k, answer]
                divergences[row.index] = (p.exp() * (p - q)).sum(-1)
                agreements[row.index] = p.argmax(-1) == q.argmax(-1)
            bar.update(len(batch))
    strata: dict[str, list[int]] = {"all": list(range(len(samples)))}
    for i, sample in enumerate(samples):
        strata.setdefault(sample.stratum, []).append(i)
    return {
        name: _summary([divergences[i] for i in chosen], [agreements[i] for i in chosen])
        for name, chosen in strata.items()
    }


def _tokenize(tokenizer: PreTrainedTokenizerBase, index: int, sample: Sample) -> _Tokenized:
    prompt, completion = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (sample.prompt, sample.completion)
    )
    return _Tokenized(index, prompt + completion, len(prompt))


def _batches(rows: Sequence[_Tokenized]) -> Iterator[list[_Tokenized]]:
    batch: list[_Tokenized] = []
    for row in sorted(rows, key=lambda r: len(r.ids)):
        if batch and (len(batch) + 1) * len(row.ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _log_probabilities(model: GlmMoeDsaForCausalLM, batch: Sequence[_Tokenized]) -> Tensor:
    """-> fp64 `[B, S, V]`. Padding stands behind each row, where a causal model cannot see it."""
    ids = torch.zeros(len(batch), max(len(row.ids) for row in batch), dtype=torch.long)
    for k, row in enumerate(batch):
        ids[k, : len(row.ids)] = torch.tensor(row.ids)
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.double().log_softmax(-1)


def _summary(divergences: Sequence[Tensor], agreements: Sequence[Tensor]) -> Divergence:
    values = torch.cat(list(divergences))
    median, p95, p99 = values.quantile(torch.tensor([0.5, 0.95, 0.99], dtype=values.dtype)).tolist()
    low, high = bootstrap([v.sum().item() for v in divergences], [len(v) for v in divergences])
    return Divergence(
        tokens=len(values),
        mean=values.mean().item(),
        low=low,
        high=high,
        window_mean=torch.stack([v.mean() for v in divergences]).mean().item(),
        median=median,
        p95=p95,
        p99=p99,
        top1=torch.cat(list(agreements)).double().mean().item(),
    )
