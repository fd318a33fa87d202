"""Takes secrets out of objects and texts: by the key they stand under, by their look, and by their value if known."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

REMOVED = "<removed>"
_WORD = (
    r"(?:token|password|passwd|passphrase|secret|api[-_]?key|access[-_]?key|account[-_]?key|private[-_]?key"
    r"|client[-_]?key(?:[-_]data)?|authorization|credentials?|cookie)"
)
_KEY = re.compile(rf".*{_WORD}", re.IGNORECASE)
_REFERENCES = {"existingsecret", "secretname", "tokensecret", "serviceaccounttoken"}
"""Keys that look like secrets and hold the name of one."""
_HIDDEN_WHOLE = ("kubectl.kubernetes.io/last-applied-configuration",)
_PATTERNS: Sequence[tuple[re.Pattern[str], str]] = (
    (
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
        REMOVED,
    ),
    (re.compile(r"((?:proxy-)?authorization[\"']?\s*[:=]\s*)[\"']?[^\r\n\"']+", re.IGNORECASE), rf"\1{REMOVED}"),
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE), rf"\1 {REMOVED}"),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"), REMOVED),
    (re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[a-z]-)[\w-]{12,}"), REMOVED),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), REMOVED),
    (re.compile(r"(\w+://)[^\s/@\"']+@"), rf"\1{REMOVED}@"),
    (re.compile(r"(https?://[^\s?\"'<>]+)\?[^\s\"'<>]+"), rf"\1?{REMOVED}"),
    (re.compile(rf"((?:^|\s)--[\w-]*{_WORD}(?:=|\s+))[^\s\"',]+", re.IGNORECASE), rf"\1{REMOVED}"),
    (
        re.compile(
            rf"([\w-]*{_WORD}[\"']?[ \t]*[=:][ \t]*)(?!None\b|null\b|{REMOVED})"
            r"(\"[^\"\n]*\"|'[^'\n]*'|[^\s,;)}\]]+)",
            re.IGNORECASE,
        ),
        rf"\1{REMOVED}",
    ),
)  # fmt: skip


def redacted(value: Any, known: Sequence[str] = ()) -> Any:
    """An object without its secrets.

    Args:
        value: JSON.
        known: Secrets that are known, to be removed wherever they are.
    """
    if isinstance(value, str):
        return redacted_text(value, known)
    if isinstance(value, list):
        return _redacted_list(value, known)
    if not isinstance(value, Mapping):
        return value
    is_variable = isinstance(value.get("name"), str) and "value" in value and is_secret_key(value["name"])
    return {
        key: REMOVED
        if key in _HIDDEN_WHOLE or _hides(key, held) or (is_variable and key == "value")
        else redacted(held, known)
        for key, held in value.items()
    }


def redacted_text(text: str, known: Sequence[str] = ()) -> str:
    """A text without its secrets."""
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, REMOVED)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def is_secret_key(key: str) -> bool:
    """Whether what stands under a key is a secret and not the name of one."""
    return _KEY.fullmatch(key) is not None and re.sub(r"[-_.]", "", key).lower() not in _REFERENCES


def _hides(key: object, held: object) -> bool:
    return isinstance(key, str) and isinstance(held, str) and bool(held) and is_secret_key(key)


def _redacted_list(values: Sequence[Any], known: Sequence[str]) -> list[Any]:
    """A list; what follows an option that takes a secret goes as well."""
    made: list[Any] = []
    is_next = False
    for value in values:
        made.append(REMOVED if is_next and isinstance(value, str) else redacted(value, known))
        is_next = isinstance(value, str) and value.startswith("--") and is_secret_key(value.removeprefix("--"))
    return made
