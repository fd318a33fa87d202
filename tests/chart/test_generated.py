"""values.yaml, its schema and the README's table are what `charts/values.py` makes, and every value does something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import generate
import vqserve
from chart.helm import CHART
from values import Values

TEMPLATES = "".join(path.read_text("utf-8") for path in sorted((CHART / "templates").rglob("*")) if path.is_file())


@pytest.mark.parametrize("path", sorted(generate.generated()), ids=lambda path: path.name)
def test_a_generated_file_is_up_to_date(path: Path) -> None:
    assert path.read_text("utf-8") == generate.generated()[path], "run `make chart`"


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_generation_does_not_depend_on_the_order_of_hashes(hash_seed: str) -> None:
    code = "import generate; print(generate.values_yaml() + generate.schema(), end='')"
    made = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHART.parent,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout == generate.values_yaml() + generate.schema()


def test_the_written_defaults_are_the_models() -> None:
    assert Values.model_validate(yaml.safe_load(generate.values_yaml())) == Values()


@pytest.mark.parametrize("path", [path for path, _, _ in generate.leaves(Values(), "")])
def test_every_value_is_used_by_a_template(path: str) -> None:
    assert any(f"Values.{path}{end}" in TEMPLATES for end in (" ", ")", "\n")), f"nothing reads {path}"


def test_templates_read_no_value_that_is_not_there() -> None:
    known = {path for path, _, _ in generate.leaves(Values(), "")}
    words = {word.strip("()}{,|") for word in TEMPLATES.split() if "Values." in word}
    read = {word.partition("Values.")[2] for word in words}
    within = ("resources.limits", "resources.requests")  # what Kubernetes defines
    assert {path for path in read if path not in within} - known == set()


def test_the_schema_is_of_the_draft_that_both_helms_know() -> None:
    schema = json.loads(generate.schema())
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert schema["additionalProperties"] is False


def test_the_chart_is_of_the_packages_version() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))["appVersion"] == vqserve.__version__
