"""What the model card takes over from the parent's and from options."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vqserve.encode.card import parent_license, yaml_text


@pytest.mark.parametrize("line", ["mit", '"mit"', "'mit' # as published", "mit  # as published"])
def test_the_parents_licence_is_what_its_card_means(line: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: {line}\nlanguage: ja\n---\n# GLM\n")
    assert parent_license(tmp_path) == "mit"


@pytest.mark.parametrize(
    "text", ["zai-org/GLM-5.2", "apache-2.0", "no", "GLM: the parent", '"', "5.2", "模型", "a # b"]
)
def test_names_are_read_as_they_are_whatever_they_are(text: str) -> None:
    assert yaml.safe_load(f"name: {yaml_text(text)}") == {"name": text}
