"""Writes values.yaml, values.schema.json and the README's table of values from `values.py`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from values import Section, Values

CHART = Path(__file__).parent / "vqserve"
BEGIN, END = "<!-- values: begin, written by charts/generate.py -->\n", "<!-- values: end -->\n"
_WIDTH = 120


def main() -> None:
    """Writes all three files."""
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")


def generated() -> dict[Path, str]:
    """What each file should hold."""
    readme = CHART / "README.md"
    return {
        CHART / "values.yaml": values_yaml(),
        CHART / "values.schema.json": schema(),
        readme: with_table(readme.read_text(encoding="utf-8")),
    }


def values_yaml() -> str:
    """The defaults, each under its description."""
    return "\n".join(["# Written by charts/generate.py from charts/values.py.", "---", *_lines(Values(), "")]) + "\n"


def schema() -> str:
    """JSON Schema in the draft that Helm 3 and 4 both read."""
    made = _without_titles(Values.model_json_schema())
    for section in [made, *made["$defs"].values()]:
        if needed := [name for name, value in section["properties"].items() if _is_needed(value)]:
            section["required"] = needed
    made["properties"]["global"] = {"type": "object"}  # Helm hands it to every subchart
    return json.dumps({"$schema": "http://json-schema.org/draft-07/schema#"} | made, indent=2) + "\n"


def with_table(readme: str) -> str:
    """The README with its table of values written anew."""
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    rows = [f"| `{path}` | {_cell(default)} | {text} |" for path, default, text in leaves(Values(), "")]
    table = "\n".join(["", "| value | default | meaning |", "| --- | --- | --- |", *rows, ""])
    return f"{before}{BEGIN}{table}\n{END}{after}"


def leaves(section: Section, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Path, default and description of every value that is no section of ours."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, field.description or ""


def dumped(value: object) -> str:
    """YAML in the order given, and with lists indented as yamllint wants them."""

    class Indented(yaml.SafeDumper):
        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            super().increase_indent(flow, False)

    return yaml.dump(value, Dumper=Indented, sort_keys=False, width=_WIDTH)


def _lines(section: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        yield from textwrap.wrap(
            field.description or "", _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        if isinstance(value, Section):
            yield f"{indent}{name}:"
            yield from _lines(value, f"{indent}  ")
        else:
            yield from textwrap.indent(dumped({name: value}), indent).splitlines()


def _cell(default: object) -> str:
    return f"`{json.dumps(default)}`" if default not in ("", [], {}) else ""


def _is_needed(value: dict[str, Any]) -> bool:
    """Whether templates cannot do without: Helm takes a `null` for a wish to take the default away."""
    return "$ref" in value or "minItems" in value


def _without_titles(node: Any) -> Any:
    """Without the titles that pydantic makes from names, and its docstrings of ours."""
    if isinstance(node, list):
        return [_without_titles(item) for item in node]
    if not isinstance(node, dict):
        return node
    names = node.get("properties", {}) if isinstance(node.get("properties"), dict) else {}
    kept = {key: _without_titles(value) for key, value in node.items() if key != "title" or not isinstance(value, str)}
    assert set(names) == set(kept.get("properties", {}))
    return kept


if __name__ == "__main__":
    main()
