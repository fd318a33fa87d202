"""Objects as the Kubernetes API has them in JSON, and what is asked of any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Object = Mapping[str, Any]
"""An object as the API has it in JSON."""


def annotations_of(thing: Object) -> Mapping[str, str]:
    """An object's annotations."""
    found: Mapping[str, str] = thing["metadata"].get("annotations") or {}
    return found


def labels_of(thing: Object) -> Mapping[str, str]:
    """An object's labels."""
    found: Mapping[str, str] = thing["metadata"].get("labels") or {}
    return found


def name_of(thing: Object) -> str:
    """An object's name."""
    return str(thing["metadata"]["name"])


def condition(thing: Object, kind: str) -> Mapping[str, Any]:
    """A condition of an object's status; empty if it has none of that kind."""
    for found in thing.get("status", {}).get("conditions") or []:
        if found.get("type") == kind:
            return dict(found)
    return {}
