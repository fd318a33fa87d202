"""What went wrong though nothing was asked wrongly: exit code 1, where `vqserve.format.errors` has 2."""

from __future__ import annotations

from vqserve.format.errors import UsageError


class FailedError(UsageError):
    """Something outside did not do its part: a source, a pod, a cluster. One line: what, where, what to do."""
