"""The `quantization_config` of a checkpoint: which module is stored how. Frozen, validated once, strict about keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vqserve.format.errors import ConfigError
from vqserve.format.names import parse_experts_module
from vqserve.format.strict_json import check_record
from vqserve.format.tiers import GROUP, TIERS, Tier

QUANT_METHOD = "vqserve"
FORMAT_VERSION = 1
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_WHERE = "config.json: quantization_config"
_REENCODE = "re-encode the parent with `vqserve encode`"


@dataclass(frozen=True)
class VQModule:
    """The routed experts of one layer.

    Attributes:
        name: Module name, e.g. `model.layers.3.mlp.experts`.
        tiers: Per projection one string of tier ids, one letter per expert.
        group_size: Columns that share one scale; always 128 in version 1.
    """

    name: str
    tiers: Mapping[str, str]
    group_size: int = GROUP

    @property
    def experts(self) -> int:
        """How many experts it has."""
        return len(self.tiers[PROJECTIONS[0]])

    def tier(self, expert: int, proj: str) -> Tier:
        """How a projection of an expert is encoded."""
        return TIERS[self.tiers[proj][expert]]

    def used_tiers(self) -> tuple[Tier, ...]:
        """The tiers that occur in this module, in order of size: exactly those have codebooks."""
        used = set().union(*self.tiers.values())
        return tuple(tier for letter, tier in TIERS.items() if letter in used)

    @classmethod
    def from_dict(cls, value: object, where: str = _WHERE) -> VQModule:
        """Reads one record of `modules`.

        Raises:
            ConfigError: A key is missing or unknown, or a value is impossible.
        """
        record = _record(value, where, ("name", "format", "group_size", "tiers"))
        name = record["name"]
        if not isinstance(name, str) or parse_experts_module(name) is None:
            raise ConfigError(f"{where}.name", f"expected model.layers.N.mlp.experts, found {name!r}", _REENCODE)
        where = f"{_WHERE}: {name}"
        _expect(record["format"], "vq", f"{where}.format")
        _expect(record["group_size"], GROUP, f"{where}.group_size")
        tiers = _record(record["tiers"], f"{where}.tiers", PROJECTIONS)
        for proj, letters in tiers.items():
            if not isinstance(letters, str) or not letters or set(letters) - set(TIERS):
                raise ConfigError(
                    f"{where}.tiers.{proj}",
                    f"expected one letter of {'/'.join(TIERS)} per expert, found {letters!r}",
                    _REENCODE,
                )
        if len({len(letters) for letters in tiers.values()}) != 1:
            found = ", ".join(f"{proj} {len(letters)}" for proj, letters in tiers.items())
            raise ConfigError(f"{where}.tiers", f"expected equally many letters, found {found}", _REENCODE)
        return cls(name=name, tiers={proj: tiers[proj] for proj in PROJECTIONS})

    def to_dict(self) -> dict[str, Any]:
        """Inverse of `from_dict`."""
        return {"name": self.name, "format": "vq", "group_size": self.group_size, "tiers": dict(self.tiers)}


@dataclass(frozen=True)
class Spine:
    """The linear modules stored as 4-bit GPTQ tensors, by their un-fused names."""

    modules: tuple[str, ...]
    weight_bits: int = 4
    group_size: int = GROUP
    symmetric: bool = True

    @classmethod
    def from_dict(cls, value: object) -> Spine:
        """Reads the `spine` record.

        Raises:
            ConfigError: A key is missing or unknown, or a value is impossible.
        """
        where = f"{_WHERE}.spine"
        record = _record(value, where, ("format", "weight_bits", "group_size", "symmetric", "modules"))
        for key, wanted in (("format", "gptq"), ("weight_bits", 4), ("group_size", GROUP), ("symmetric", True)):
            _expect(record[key], wanted, f"{where}.{key}")
        modules = record["modules"]
        if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
            raise ConfigError(f"{where}.modules", "expected a list of module names", _REENCODE)
        _reject_twice(modules, f"{where}.modules")
        return cls(modules=tuple(modules))

    def to_dict(self) -> dict[str, Any]:
        """Inverse of `from_dict`."""
        return {
            "format": "gptq",
            "weight_bits": self.weight_bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "modules": list(self.modules),
        }


@dataclass(frozen=True)
class QuantConfig:
    """The whole `quantization_config`; `from_dict` and `to_dict` are inverse to each other."""

    modules: tuple[VQModule, ...]
    spine: Spine | None = None
    format_version: int = FORMAT_VERSION

    def module(self, name: str) -> VQModule | None:
        """The record of the routed experts called `name`; None if they are not vector-quantized."""
        return next((module for module in self.modules if module.name == name), None)

    @classmethod
    def from_dict(cls, value: object) -> QuantConfig:
        """Reads and validates a `quantization_config`.

        Raises:
            ConfigError: Another method or version, a missing or unknown key, or an impossible value.
        """
        if isinstance(value, Mapping) and value.get("quant_method") != QUANT_METHOD:
            found = value.get("quant_method")
            raise ConfigError(
                f"{_WHERE}.quant_method",
                f"expected {QUANT_METHOD!r}, found {found!r}",
                "this is not a vqserve checkpoint",
            )
        # The version comes first: a later version may well have other keys.
        if isinstance(value, Mapping) and "format_version" in value:
            found = value["format_version"]
            if type(found) is not int or found != FORMAT_VERSION:
                raise ConfigError(
                    f"{_WHERE}.format_version",
                    f"expected {FORMAT_VERSION}, found {found!r}",
                    "install the vqserve release that wrote the checkpoint, or re-encode the parent with this one",
                )
        record = _record(value, _WHERE, ("quant_method", "format_version", "modules"), optional=("spine",))
        modules = record["modules"]
        if not isinstance(modules, list) or not modules:
            raise ConfigError(f"{_WHERE}.modules", "expected a list with at least one record", _REENCODE)
        read = tuple(VQModule.from_dict(entry, f"{_WHERE}.modules[{at}]") for at, entry in enumerate(modules))
        _reject_twice([module.name for module in read], f"{_WHERE}.modules")
        spine = record.get("spine")
        return cls(modules=read, spine=None if spine is None else Spine.from_dict(spine))

    def to_dict(self) -> dict[str, Any]:
        """Inverse of `from_dict`."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "modules": [module.to_dict() for module in self.modules],
            "spine": None if self.spine is None else self.spine.to_dict(),
        }


def _record(value: object, where: str, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    return check_record(value, where, ConfigError, _REENCODE, keys, optional)


def _expect(found: object, wanted: object, where: str) -> None:
    # `type` too, because True == 1 and 4.0 == 4 in Python but not in the specification.
    if type(found) is not type(wanted) or found != wanted:
        raise ConfigError(where, f"expected {wanted!r}, found {found!r}", _REENCODE)


def _reject_twice(names: list[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(where, f"{name} is listed twice", _REENCODE)
        seen.add(name)
