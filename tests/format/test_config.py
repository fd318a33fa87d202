from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from vqserve.format.config import QuantConfig, Spine, VQModule
from vqserve.format.errors import CheckpointError, ConfigError

GOLDEN = json.loads(
    (Path(__file__).parent.parent / "golden/format-1/quantization_config.json").read_text(encoding="utf-8")
)


def test_the_golden_configuration_is_read_and_written_unchanged() -> None:
    config = QuantConfig.from_dict(GOLDEN)
    assert config.to_dict() == GOLDEN
    assert config.modules[0].tier(1, "gate_proj").id == "b"
    assert [tier.id for tier in config.modules[0].used_tiers()] == ["a", "b", "c", "d"]
    assert config.module("model.layers.3.mlp.experts") is config.modules[0]
    assert config.module("model.layers.4.mlp.experts") is None


def test_the_example_in_the_format_s_document_is_the_golden_configuration() -> None:
    document = Path(__file__).parents[2].joinpath("plugin/FORMAT.md").read_text(encoding="utf-8")
    example = re.search(r"```json\n(.*?)```", document, re.DOTALL)
    assert example is not None
    assert json.loads(example[1]) == GOLDEN


def test_the_spine_may_be_absent_or_null() -> None:
    absent = {key: value for key, value in GOLDEN.items() if key != "spine"}
    assert QuantConfig.from_dict(absent).spine is None
    assert QuantConfig.from_dict({**absent, "spine": None}).spine is None


def test_a_configuration_survives_the_way_to_a_worker_process() -> None:
    config = QuantConfig(
        (VQModule("model.layers.1.mlp.experts", dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "ad")),)
    )
    assert pickle.loads(pickle.dumps(config)) == config
    error = ConfigError("here", "this", "do that")
    assert str(pickle.loads(pickle.dumps(error))) == "here: this; do that"


def _set(config: dict[str, Any], path: tuple[str | int, ...], value: object) -> None:
    target: Any = config
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value


MODULE, TIERS, SPINE = ("modules", 0), ("modules", 0, "tiers"), ("spine",)


@pytest.mark.parametrize("path", [(), MODULE, TIERS, SPINE], ids=["top", "module", "tiers", "spine"])
def test_an_unknown_key_is_refused_at_every_level(path: tuple[str | int, ...]) -> None:
    config = copy.deepcopy(GOLDEN)
    _set(config, (*path, "bits"), 4)
    with pytest.raises(ConfigError, match="unknown key 'bits'"):
        QuantConfig.from_dict(config)


@pytest.mark.parametrize("path", [(), MODULE, TIERS, SPINE], ids=["top", "module", "tiers", "spine"])
def test_a_missing_key_is_refused_at_every_level(path: tuple[str | int, ...]) -> None:
    record: Any = GOLDEN
    for step in path:
        record = record[step]
    for key in record:
        if (path, key) == ((), "spine"):
            continue
        config = copy.deepcopy(GOLDEN)
        _set(config, path, {name: value for name, value in record.items() if name != key}) if path else config.pop(key)
        with pytest.raises(ConfigError, match=key):
            QuantConfig.from_dict(config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("quant_method",), "fp8"),
        (("format_version",), 2),
        (("format_version",), True),
        (("format_version",), "1"),
        (("modules",), []),
        (("modules",), {}),
        (("modules", 0), "model.layers.3.mlp.experts"),
        ((*MODULE, "name"), "model.layers.3.mlp"),
        ((*MODULE, "name"), 3),
        ((*MODULE, "format"), "gptq"),
        ((*MODULE, "group_size"), 64),
        ((*MODULE, "group_size"), 128.0),
        ((*MODULE, "tiers"), None),
        ((*TIERS, "up_proj"), "abcz"),
        ((*TIERS, "up_proj"), "abc"),
        ((*TIERS, "up_proj"), ""),
        ((*TIERS, "up_proj"), ["a", "b", "c", "d"]),
        ((*SPINE, "format"), "awq"),
        ((*SPINE, "weight_bits"), 8),
        ((*SPINE, "weight_bits"), True),
        ((*SPINE, "group_size"), -1),
        ((*SPINE, "symmetric"), 1),
        ((*SPINE, "modules"), "model.layers.0.self_attn.o_proj"),
        ((*SPINE, "modules"), [0]),
        ((*SPINE, "modules"), ["a", "a"]),
    ],
)
def test_an_impossible_value_is_refused_with_its_place(path: tuple[str | int, ...], value: object) -> None:
    config = copy.deepcopy(GOLDEN)
    _set(config, path, value)
    with pytest.raises(ConfigError) as refused:
        QuantConfig.from_dict(config)
    assert str(refused.value).startswith("config.json: quantization_config")
    assert "\n" not in str(refused.value)


def test_a_module_listed_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.3\.mlp\.experts is listed twice"):
        QuantConfig.from_dict({**GOLDEN, "modules": GOLDEN["modules"] * 2})


@pytest.mark.parametrize("value", [None, [], "vqserve", 1])
def test_a_configuration_that_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="expected an object"):
        QuantConfig.from_dict(value)


def test_a_later_version_is_named_before_its_unknown_keys() -> None:
    with pytest.raises(ConfigError, match="format_version: expected 1, found 2"):
        QuantConfig.from_dict({**GOLDEN, "format_version": 2, "residual": True})


def test_the_spine_s_record_is_written_in_full() -> None:
    assert Spine(modules=("x",)).to_dict() == {
        "format": "gptq",
        "weight_bits": 4,
        "group_size": 128,
        "symmetric": True,
        "modules": ["x"],
    }
