"""Reads what helm keeps of a release: a Secret with gzip in base64 in base64."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from vqserve_ops.bundle.redact import redacted
from vqserve_ops.objects import Object, labels_of

_MOST = 64 << 20
"""Bytes that a release may have unpacked; helm's own limit is a Secret's 1 MiB, packed."""


def newest(secrets: Sequence[Object]) -> Object | None:
    """The Secret of the last revision; None if there is none."""
    releases = [secret for secret in secrets if secret.get("type") == "helm.sh/release.v1"]
    return max(releases, key=lambda secret: int(labels_of(secret).get("version", 0)), default=None)


def unpacked(secret: Object) -> dict[str, Any]:
    """The release that a Secret of helm's holds; empty if it cannot be read."""
    try:
        packed = base64.b64decode(base64.b64decode(secret["data"]["release"]))
        if packed[:2] == b"\x1f\x8b":
            packed = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(packed, _MOST)
        found = json.loads(packed)
    except (KeyError, TypeError, ValueError, binascii.Error, zlib.error):
        return {}
    return found if isinstance(found, dict) else {}


def files_of(release: Mapping[str, Any], known: Sequence[str]) -> dict[str, str]:
    """Values, objects and versions of a release as files, without secrets."""
    metadata = (release.get("chart") or {}).get("metadata") or {}
    about = {
        "chart": metadata.get("version"),
        "appVersion": metadata.get("appVersion"),
        "revision": release.get("version"),
        "status": (release.get("info") or {}).get("status"),
        "deployed": (release.get("info") or {}).get("last_deployed"),
    }
    files = {"helm/release.yaml": _to_yaml(about), "helm/values.yaml": _to_yaml(redacted(release.get("config"), known))}
    try:
        objects = [thing for thing in yaml.safe_load_all(str(release.get("manifest") or "")) if isinstance(thing, dict)]
    except yaml.YAMLError:
        return files
    shown = [redacted(thing, known) for thing in objects if thing.get("kind") != "Secret"]
    return {**files, "helm/manifest.yaml": "---\n".join(map(_to_yaml, shown))}


def _to_yaml(value: object) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
