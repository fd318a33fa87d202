"""KL divergence of a checkpoint from its parent: teacher-forced, over the full vocabulary, in nats per answer token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from vqserve.evaluate.statistics import bootstrap
from vqserve.format.errors import UsageError
from vqserve.model.forward import Head, Layer, embed
from vqserve.model.tokens import Tokens
from vqserve.model.weights import Model


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


@torch.no_grad()
def divergence(
    parent: Model,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    progress: bool = False,
) -> dict[str, Divergence]:
    """Compare two models on the same texts, in fp32, a layer of each at a time.

    Args:
        parent: The reference distribution; same vocabulary as `model`.
        model: What is measured.
        tokenizer: Of either.
        samples: Texts of at most `index_topk` tokens: up to there sparse and dense attention are the same.
        progress: Show a bar.

    Returns:
        By stratum, and under "all" over everything.

    Raises:
        UsageError: A text is too long, or the two models do not have the same layers and vocabulary.
    """
    mine, theirs = model.geometry, parent.geometry
    if (mine.num_hidden_layers, mine.vocab_size) != (theirs.num_hidden_layers, theirs.vocab_size):
        raise UsageError("the two models have not the same layers and vocabulary; give a checkpoint and its own parent")
    tokens = _tokens(tokenizer, samples, theirs.index_topk)
    layers, device = theirs.num_hidden_layers, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = (parent, model)
    hidden = [embed(each, tokens, torch.float32) for each in models]
    with tqdm(total=layers, desc="KL", unit="layer", disable=not progress) as bar:
        for layer in range(layers):
            for at, each in enumerate(models):
                hidden[at] = Layer(each, layer, device, torch.float32).run(tokens, hidden[at], {})
            bar.update()
    heads = [Head(each, device, torch.float32) for each in models]
    divergences: list[Tensor] = []
    agreements: list[Tensor] = []
    for *outputs, counts in zip(*(each.split(tokens.lengths) for each in (*hidden, tokens.predicts)), strict=True):
        p, q = (
            head(output[counts].to(device)).double().log_softmax(-1)
            for head, output in zip(heads, outputs, strict=True)
        )
        divergences.append((p.exp() * (p - q)).sum(-1).cpu())
        agreements.append((p.argmax(-1) == q.argmax(-1)).cpu())
    strata: dict[str, list[int]] = {"all": list(range(len(samples)))}
    for i, sample in enumerate(samples):
        strata.setdefault(sample.stratum, []).append(i)
    return {
        name: _summary([divergences[i] for i in chosen], [agreements[i] for i in chosen])
        for name, chosen in strata.items()
    }


def _tokens(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], longest: int) -> Tokens:
    """The samples as sequences, in their order; what counts are the predictions of an answer's tokens."""
    ids: list[int] = []
    counts: list[bool] = []
    lengths: list[int] = []
    for number, sample in enumerate(samples, start=1):
        prompt, completion = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (sample.prompt, sample.completion)
        )
        length = len(prompt) + len(completion)
        if length > longest:
            raise UsageError(
                f"text {number} has {length} tokens; give texts of at most {longest}, the model's index_topk"
            )
        ids += prompt + completion
        counts += [len(prompt) - 1 <= at < length - 1 for at in range(length)]
        lengths.append(length)
    return Tokens(torch.tensor(ids), torch.tensor(counts), tuple(lengths))


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
