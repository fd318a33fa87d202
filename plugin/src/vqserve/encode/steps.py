"""The steps of an encode, each from files to files in the work folder.

- `survey`, layer by layer: routing, a sample of normalized weights, the 4-bit spine, the next layer's inputs.
- `gradient`, backwards, layer by layer: how the log-likelihood changes with each layer's outputs.
- `codebooks`, once, from all layers' samples.
- `prior`, once a layer: what its experts have in common.
- `encode_batch`, in any order, any number at once: a few experts of one layer in every tier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqserve.encode import batch as batches_of
from vqserve.encode.codebook import fit_codebooks, normalized_vectors
from vqserve.encode.fisher import fisher_gradient
from vqserve.encode.parent import Parent
from vqserve.encode.scalar import encode_spine
from vqserve.encode.statistics import Routing, expert_moments
from vqserve.encode.work import Work
from vqserve.format.config import PROJECTIONS
from vqserve.format.errors import CheckpointError
from vqserve.format.layout import spine_modules
from vqserve.format.names import layer_of
from vqserve.format.tiers import TIERS
from vqserve.model.forward import Layer, Watcher, compute_dtype, embed
from vqserve.model.tokens import Batch, Tokens
from vqserve.reference.dequantize import Codebook

GRADIENT_TOKENS = 2**16
"""Leading calibration tokens that the sensitivity is measured on."""
SENSITIVITY_TEMPERATURE = 4.0
"""Of the predictions that the sensitivity is measured on. A model that is sure of its answers loses nothing by any
error, to second order and at its own optimum; what tells experts apart is then the noise of the few unsure tokens.
Flattened predictions show how far an answer is from tipping over. Measured on the demo's parent, experts only,
allocated to 2.125 bit, KL in nats per answer token (2.125 bit for all: 0.0134): 1: 0.077, 1.5: 0.062, 2: 0.0078,
3: 0.0026, 4: 0.0020, 6: 0.0034, 10: 0.0056; at 1.625 bit likewise, 3 to 10 being within 10 % of each other."""
CODEBOOK_VECTORS = 2**20
"""Sampled vectors of each d, over all layers."""
SAMPLED_EXPERTS = 16
"""Experts of a layer that vectors are sampled from."""
EXPERTS_AT_ONCE = {"cpu": 4, "cuda": 16}
"""Experts per step: on the CPU so that a block of rows stays in cache, on a GPU so that 4 GiB hold their H."""
WIDTHS = sorted({tier.d for tier in TIERS.values()})
"""Weights per codeword that occur among the tiers."""
_LONGEST = max(WIDTHS)


@dataclass(frozen=True)
class Job:
    """What every step works with.

    Attributes:
        parent: The checkpoint to encode.
        tokens: The calibration text.
        work: Where results go.
        device: To compute on.
        seed: Of all random choices.
    """

    parent: Parent
    tokens: Tokens
    work: Work
    device: torch.device
    seed: int

    @property
    def batches(self) -> list[tuple[int, range]]:
        """Layer and experts of each `encode_batch` step."""
        geometry, size = self.parent.geometry, EXPERTS_AT_ONCE[self.device.type]
        count = geometry.n_routed_experts
        starts = range(0, count, size)
        return [(layer, range(at, min(at + size, count))) for layer in geometry.moe_layers for at in starts]

    @property
    def gradient_tokens(self) -> Tokens:
        """The tokens that the sensitivity is measured on."""
        return self.tokens.head(GRADIENT_TOKENS)


def first_to_survey(job: Job) -> int:
    """The layer to go on with; the number of layers if all are surveyed.

    A layer whose results were lost is surveyed again, and so are those before it whose inputs are needed for that.
    """
    layers = job.parent.geometry.num_hidden_layers
    lacking = next((layer for layer in range(layers) if not all(map(job.work.has, _surveyed(job, layer)))), layers)
    if lacking == layers and job.work.has(f"hidden-{layers}"):
        return layers
    return next((layer for layer in range(min(lacking, layers - 1), 0, -1) if job.work.has(f"hidden-{layer}")), 0)


def _surveyed(job: Job, layer: int) -> list[str]:
    """What the survey of a layer leaves for later steps, but for the next layer's inputs."""
    parts = ("routing", "vectors", "entry") if layer in job.parent.geometry.moe_layers else ()
    return [f"{part}-{layer}" for part in ("spine", *parts)]


def survey(job: Job, layer: int) -> None:
    """Runs one layer over all tokens and saves what later steps need of it.

    The layer's inputs are the outputs of the layer before, saved by its survey; they are removed at the end.
    """
    if layer == 0:
        hidden = embed(job.parent, job.tokens, compute_dtype(job.device))
    else:
        hidden = job.work.load(f"hidden-{layer}")["hidden"]
    moments = _Moments()
    stem = f"model.layers.{layer}."
    spine = [name for name in spine_modules(job.parent.geometry) if layer_of(name) == layer]
    watchers: dict[str, Watcher] = {_source(name.removeprefix(stem)): moments.watch(_source(name)) for name in spine}
    routing = None
    if layer in job.parent.geometry.moe_layers:
        routing = _empty_routing(job, len(hidden))
        watchers["mlp.gate"] = _watch_routing(routing)
    output = Layer(job.parent, layer, job.device).run(job.tokens, hidden, watchers)
    if not output.isfinite().all():
        problem = "the outputs of this layer are not finite on the calibration text: its weights are too large"
        raise CheckpointError(f"{job.parent.folder}: model.layers.{layer}", problem, "give another parent")
    tensors = {}
    for name in spine:
        weight = job.parent.tensor(f"{name}.weight").to(job.device, torch.float32)
        encoded = encode_spine(weight, moments.sums[_source(name)])
        tensors.update({f"{name}.{part}": tensor for part, tensor in encoded.items()})
    job.work.save(f"spine-{layer}", tensors)
    if routing is not None:
        parts = {"inputs": routing.inputs, "chosen": routing.chosen, "weights": routing.weights}
        job.work.save(f"routing-{layer}", parts)
        job.work.save(f"vectors-{layer}", _sample_vectors(job, layer, routing))
        job.work.save(f"entry-{layer}", {"hidden": hidden[: len(job.gradient_tokens.ids)]})
    job.work.save(f"hidden-{layer + 1}", {"hidden": output})
    job.work.remove(f"hidden-{layer}")


def gradient(job: Job, layer: int) -> None:
    """Saves the gradient of the log-likelihood with respect to a layer's outputs, from that of the layer after."""
    tokens, last = job.gradient_tokens, job.parent.geometry.num_hidden_layers - 1
    if layer == last:
        hidden = job.work.load(f"hidden-{last + 1}")["hidden"][: len(tokens.ids)]
        found = fisher_gradient(job.parent, tokens, hidden, job.device, job.seed, SENSITIVITY_TEMPERATURE)
    else:
        hidden = job.work.load(f"entry-{layer + 1}")["hidden"]
        outer = job.work.load(f"gradient-{layer + 1}")["gradient"]
        found = Layer(job.parent, layer + 1, job.device).backward(tokens, hidden, outer)
    job.work.save(f"gradient-{layer}", {"gradient": found})


def codebooks(job: Job, d: int) -> None:
    """Fits and saves the codebooks of all tiers with a d."""
    parts = [job.work.load(f"vectors-{layer}") for layer in job.parent.geometry.moe_layers]
    generator = torch.Generator().manual_seed(job.seed)
    vectors = torch.cat([part[f"vectors_{d}"] for part in parts])
    counts = torch.cat([part[f"counts_{d}"] for part in parts])
    order = torch.randperm(len(vectors), generator=generator)[:CODEBOOK_VECTORS]
    tensors = {}
    for letter, codebook in fit_codebooks(
        vectors[order].to(job.device), counts[order].to(job.device), generator
    ).items():
        tensors[letter] = codebook.base
        if codebook.refinement is not None:
            tensors[f"{letter}_refinement"] = codebook.refinement
    job.work.save(f"codebooks-{d}", tensors)


def load_codebooks(work: Work) -> dict[str, Codebook]:
    """The saved codebooks by tier."""
    tensors = {name: tensor for d in WIDTHS for name, tensor in work.load(f"codebooks-{d}").items()}
    return {
        letter: Codebook(tier, tensors[letter], tensors.get(f"{letter}_refinement")) for letter, tier in TIERS.items()
    }


def prior(job: Job, layer: int) -> None:
    """Saves what the experts of a layer have in common."""
    routing, outer = _seen(job, layer)
    probe = load_codebooks(job.work)[batches_of.PROBE]
    at_once = EXPERTS_AT_ONCE[job.device.type]
    found = batches_of.learn_prior(job.parent, layer, routing, outer, probe, job.device, at_once)
    job.work.save(f"prior-{layer}", found.to_tensors())


def problem_of(job: Job, layer: int, experts: range) -> batches_of.Problem:
    """The statistics of a few experts, from the results of the other steps."""
    routing, outer = _seen(job, layer)
    found = batches_of.Prior.from_tensors(job.work.load(f"prior-{layer}"), job.device)
    return batches_of.state_problem(job.parent, layer, experts, routing, outer, found, job.device)


def _seen(job: Job, layer: int) -> tuple[Routing, Tensor]:
    """What the experts of a layer are given, and the gradient with respect to its outputs."""
    return Routing(**job.work.load(f"routing-{layer}")), job.work.load(f"gradient-{layer}")["gradient"]


def encode_batch(job: Job, layer: int, experts: range) -> None:
    """Encodes a few experts of a layer in every tier and saves planes and costs."""
    problem = problem_of(job, layer, experts)
    job.work.save(batch_name(layer, experts), batches_of.encode_experts(problem, load_codebooks(job.work)))


def batch_name(layer: int, experts: range) -> str:
    """The name of the result of an `encode_batch` step."""
    return f"experts-{layer}-{experts.start}"


class _Moments:
    """Sums of x x' over all tokens of what modules take in."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def watch(self, name: str) -> Watcher:
        def see(batch: Batch, inputs: Tensor, output: Any) -> None:
            flat = inputs[batch.valid.to(inputs.device)].float()
            self.sums[name] = self.sums.get(name, 0) + flat.t() @ flat

        return see


def _source(name: str) -> str:
    """The module whose inputs stand for those of `name`: the indexer does not run, and takes the same as q_b_proj."""
    return name.replace("indexer.wq_b", "q_b_proj")


def _empty_routing(job: Job, count: int) -> Routing:
    geometry = job.parent.geometry
    chosen = count, geometry.num_experts_per_tok
    inputs = torch.empty(count, geometry.hidden_size, dtype=torch.bfloat16)
    return Routing(inputs, torch.empty(chosen, dtype=torch.int32), torch.empty(chosen))


def _watch_routing(routing: Routing) -> Watcher:
    def see(batch: Batch, inputs: Tensor, output: Any) -> None:
        places, valid = batch.index[batch.valid], batch.valid.to(inputs.device)
        _, weights, experts = output
        routing.inputs[places] = inputs[valid].to(routing.inputs)
        routing.chosen[places] = experts.view(*valid.shape, -1)[valid].to(routing.chosen)
        routing.weights[places] = weights.view(*valid.shape, -1)[valid].to(routing.weights)

    return see


def _sample_vectors(job: Job, layer: int, routing: Routing) -> dict[str, Tensor]:
    """Normalized weights of random rows of the layer's experts, cut into vectors for each d."""
    geometry = job.parent.geometry
    generator = torch.Generator().manual_seed(job.seed * 1000 + layer)
    chosen = torch.randperm(geometry.n_routed_experts, generator=generator)[:SAMPLED_EXPERTS].tolist()
    vectors_each = CODEBOOK_VECTORS / len(geometry.moe_layers) / len(PROJECTIONS) / len(chosen)
    parts: dict[str, list[Tensor]] = {}
    for expert in chosen:
        one = range(expert, expert + 1)
        weights = job.parent.expert_weights(layer, one, job.device)
        outer, inner = expert_moments(routing, one, weights)
        for proj, weight in weights.items():
            rows = math.ceil(vectors_each * _LONGEST / weight.shape[2])
            picked = weight[:, torch.randperm(weight.shape[1], generator=generator)[:rows].to(job.device)]
            sums = (inner if proj == "down_proj" else outer).sums
            for d in WIDTHS:
                vectors, counts = normalized_vectors(picked, sums.diagonal(dim1=-2, dim2=-1), d)
                parts.setdefault(f"vectors_{d}", []).append(vectors[0].cpu())
                parts.setdefault(f"counts_{d}", []).append(counts[0].cpu())
    return {name: torch.cat(found) for name, found in parts.items()}
