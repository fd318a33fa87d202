"""`vqserve inspect PATH`: what a checkpoint holds: the tiers of its experts, bits per weight, and bytes by part.

Nothing but headers and a few small tensors is read. A `config.json` alone will do: what it calls for is then shown.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from vqserve.format.config import PROJECTIONS, QuantConfig
from vqserve.format.errors import ConfigError
from vqserve.format.files import called, check_checkpoint, described, readable
from vqserve.format.geometry import Geometry
from vqserve.format.layout import parent_specs
from vqserve.format.names import layer_of, parse_expert_tensor, parse_experts_module
from vqserve.format.strict_json import read_object
from vqserve.format.tiers import TIERS
from vqserve.tables import check_picture, check_targets, gib, print_table, write_json

_PARTS = _EXPERTS, _FOUR_BIT, _KEPT = "routed experts", "4-bit spine", "not quantized"
_SPINE = {"qweight": "codes", "scales": "scales", "qzeros": "zero points"}


@dataclass(frozen=True)
class Inventory:
    """What a checkpoint holds.

    Attributes:
        tiers: Per MoE layer and projection, how many experts are in each of the tiers, in the order of `TIERS`.
        letters: Per MoE layer and projection, the tier of every expert, a letter each.
        experts: Per tier, how many (expert, projection) pairs are in it, their weights and their bytes.
        parts: Bytes of tensors by part and, in it, by kind.
        weights: Weights of the whole model before it was encoded.
    """

    tiers: Mapping[int, Mapping[str, tuple[int, ...]]]
    letters: Mapping[int, Mapping[str, str]]
    experts: Mapping[str, tuple[int, int, int]]
    parts: Mapping[str, Mapping[str, int]]
    weights: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(sum(kinds.values()) for kinds in self.parts.values())

    def bits(self, layer: int | None = None) -> tuple[float, float]:
        """Bits per weight of the vector-quantized experts, of one layer or of all, without scales and with them."""
        counted: Counter[str] = Counter()
        for at, projections in self.tiers.items():
            for counts in projections.values() if layer in (None, at) else ():
                counted.update(dict(zip(TIERS, counts, strict=True)))
        # Every projection of an expert has equally many weights.
        count = counted.total()
        without = sum(TIERS[letter].bits * number for letter, number in counted.items()) / count
        return without, sum(TIERS[letter].effective_bits * number for letter, number in counted.items()) / count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `vqserve inspect`."""
    parser.add_argument("path", type=Path, metavar="PATH", help="folder of a checkpoint, or a config.json alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it all, with the tier of every expert")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the tiers by layer, .png or .svg; needs [plot]")


def run(args: argparse.Namespace) -> int:
    """Prints what a checkpoint holds.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged or not quantized.
        UsageError: A file cannot be written, or matplotlib is needed and missing.
    """
    check_targets({"--json": args.json, "--plot": args.plot}, [args.path])
    if args.plot is not None:
        check_picture(args.plot)
    found, total = read_inventory(args.path)
    print_tiers(args.path, found)
    print_bits(found)
    print_parts(found)
    if total is not None:
        print(f"All files: {gib(total)}, of which {gib(total - found.nbytes)} are not tensors")
    if args.json is not None:
        write_json(args.json, report(args.path, found, total))
    if args.plot is not None:
        from vqserve.checkpoint.picture import draw  # matplotlib takes a second, and may be missing

        draw(args.plot, found.tiers)
    return 0


def read_inventory(path: Path) -> tuple[Inventory, int | None]:
    """What a checkpoint holds, and the bytes of all its files; None for a `config.json` alone.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged or not quantized.
    """
    if path.is_dir() or not path.exists():
        checkpoint = check_checkpoint(path, digests=False)
        stored = {name: tensor.nbytes for name, tensor in checkpoint.tensors.items()}
        size = sum(record.size for record in checkpoint.files.values())
        return inventory(checkpoint.geometry, checkpoint.quant, stored), size
    with readable(path), called(path):
        geometry, quant, specs = described(path.parent, read_object(path, ConfigError))
    return inventory(geometry, quant, {spec.name: spec.nbytes for spec in specs.values() if spec.required}), None


def inventory(geometry: Geometry, quant: QuantConfig, stored: Mapping[str, int]) -> Inventory:
    """What a checkpoint holds whose tensors have so many bytes, by name."""
    records = {layer: module for module in quant.modules if (layer := parse_experts_module(module.name)) is not None}
    letters = {layer: module.tiers for layer, module in sorted(records.items())}
    tiers = {
        layer: {proj: tuple(text.count(letter) for letter in TIERS) for proj, text in projections.items()}
        for layer, projections in letters.items()
    }
    experts: dict[str, tuple[int, int, int]] = {}
    for at, (letter, tier) in enumerate(TIERS.items()):
        counts = {proj: sum(layer[proj][at] for layer in tiers.values()) for proj in PROJECTIONS}
        shapes = {proj: geometry.expert_shape(proj) for proj in PROJECTIONS}
        experts[letter] = (
            sum(counts.values()),
            sum(count * prod(shapes[proj]) for proj, count in counts.items()),
            sum(count * tier.weight_bytes(*shapes[proj]) for proj, count in counts.items()),
        )
    parts: dict[str, Counter[str]] = {part: Counter() for part in _PARTS}
    for name, nbytes in stored.items():
        part, kind = _part(name, geometry)
        parts[part][kind] += nbytes
    largest_first = {part: dict(kinds.most_common()) for part, kinds in parts.items()}
    return Inventory(tiers, letters, experts, largest_first, _weights(geometry, stored))


def _weights(geometry: Geometry, stored: Mapping[str, int]) -> int:
    """Weights of the parent: all that its geometry calls for, multi-token-prediction layers only if they are stored."""
    kept = any(layer_of(name) in geometry.mtp_layers for name in stored)
    specs = parent_specs(geometry).values()
    return sum(prod(spec.shape) for spec in specs if spec.required or kept)


def _part(name: str, geometry: Geometry) -> tuple[str, str]:
    """The part that a tensor belongs to, and what it is in it."""
    expert, leaf = parse_expert_tensor(name), name.rpartition(".")[2]
    if expert is not None:
        return _EXPERTS, _KEPT if expert.part == "weight" else expert.part
    if ".routed_experts." in name:
        return _EXPERTS, "codebooks"
    if leaf in _SPINE:
        return _FOUR_BIT, _SPINE[leaf]
    if layer_of(name) in geometry.mtp_layers:
        return _KEPT, "multi-token prediction"
    for mark, kind in (
        ("embed_tokens", "embeddings"),
        ("lm_head", "lm_head"),
        (".indexer.", "indexer"),
        ("kv_b_proj", "kv_b_proj"),
        (".mlp.gate.", "router"),
        ("norm.", "norms"),
    ):
        if mark in name:
            return _KEPT, kind
    return _KEPT, "other linear layers"


def print_tiers(path: Path, found: Inventory) -> None:
    """Prints the tiers of every layer; layers in a row that have the same share a line."""
    title = f"{path}: experts per tier ({' / '.join(f'{tier.bits:g}' for tier in TIERS.values())} bit), by layer"
    columns = ["layers", *(f"{proj} {'/'.join(TIERS)}" for proj in PROJECTIONS), "bits", "with scales"]
    print_table(title, columns, list(_tier_rows(found)))


def _tier_rows(found: Inventory) -> Iterator[Sequence[str]]:
    width = max(len(str(count)) for layer in found.tiers.values() for counts in layer.values() for count in counts)
    # Neighbours have the same difference to their place.
    numbered = enumerate(found.tiers)
    for (counts, _), same in groupby(numbered, lambda item: (found.tiers[item[1]], item[1] - item[0])):
        layers = [layer for _, layer in same]
        cells = (" / ".join(f"{count:>{width}}" for count in counts[proj]) for proj in PROJECTIONS)
        span = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        yield [span, *cells, *(f"{bits:.3f}" for bits in found.bits(layers[0]))]


def print_bits(found: Inventory) -> None:
    """Prints how many of the experts' weights are in each tier, and what they cost."""
    weights = sum(number for _, number, _ in found.experts.values())
    rows = []
    for letter, (pairs, number, nbytes) in found.experts.items():
        tier = TIERS[letter]
        costs = (f"{tier.bits:g}", f"{tier.effective_bits:g}")
        rows.append([letter, f"{pairs:,}", f"{number:,}", f"{number / weights:.1%}", *costs, gib(nbytes)])
    totals = [sum(values) for values in zip(*found.experts.values(), strict=True)]
    average = (f"{bits:.3f}" for bits in found.bits())
    rows.append(["all", f"{totals[0]:,}", f"{totals[1]:,}", "100.0%", *average, gib(totals[2])])
    columns = ["tier", "projections of experts", "weights", "share", "bits", "with scales", "bytes"]
    print_table("Vector-quantized experts, bits per weight", columns, rows)


def print_parts(found: Inventory) -> None:
    """Prints bytes by part."""
    rows = []
    for part, kinds in found.parts.items():
        lines = [(part, sum(kinds.values())), *((f"  {kind}", nbytes) for kind, nbytes in kinds.items())]
        rows += [[name, gib(nbytes), f"{nbytes / found.nbytes:.1%}"] for name, nbytes in lines]
    print_table("Bytes of tensors", ["part", "bytes", "share"], [*rows, ["all", gib(found.nbytes), "100.0%"]])
    print(f"The whole model: {found.nbytes * 8 / found.weights:.3f} bits for each of {found.weights:,} weights")


def report(path: Path, found: Inventory, total: int | None) -> dict[str, Any]:
    """What `--json` writes."""
    without, including = found.bits()
    return {
        "path": str(path),
        "bits_per_expert_weight": {"without_scales": without, "with_scales": including},
        "bits_per_weight_of_the_model": found.nbytes * 8 / found.weights,
        "weights": found.weights,
        "layers": [
            {
                "layer": layer,
                "tiers": dict(found.letters[layer]),
                "experts": {proj: dict(zip(TIERS, counts, strict=True)) for proj, counts in projections.items()},
                "bits_per_weight": dict(zip(("without_scales", "with_scales"), found.bits(layer), strict=True)),
            }
            for layer, projections in found.tiers.items()
        ],
        "bytes": {
            **found.parts,
            "tensors": found.nbytes,
            "files": total,
        },
    }
