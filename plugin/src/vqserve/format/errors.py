"""Errors that a person can act on: one line each, saying where, what and what to do."""

from __future__ import annotations


class UsageError(Exception):
    """A wrong argument or environment of the user: port taken, unsupported vLLM version, plugin missing."""

    def __str__(self) -> str:
        return _printable(super().__str__())


class CheckpointError(Exception):
    """A checkpoint that cannot be trusted or used.

    Args:
        where: File, or file and tensor or key, that the error is about.
        problem: What was expected and what was found.
        remedy: What the reader can do about it.
    """

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        # All three go to Exception, so that the error survives pickling between processes.
        super().__init__(where, problem, remedy)
        self.where = where
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{_one_line(self.where)}: {_one_line(self.problem)}; {self.remedy}"


def _one_line(text: str) -> str:
    """What a damaged file says may hold anything; the message stays one line of a terminal's."""
    shown = _printable(text)
    return shown if len(shown) <= 400 else f"{shown[:400]}..."


def _printable(text: str) -> str:
    """The text with escapes for what would break a line, move the cursor, or not be shown."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


class ConfigError(CheckpointError):
    """A `config.json` with a missing, unknown or impossible value."""


class ManifestError(CheckpointError):
    """A file that is missing, surplus, or differs from what `manifest.json` says."""


class TensorError(CheckpointError):
    """A safetensors file or one of its tensors that is not what the configuration calls for."""
