"""Kernels need Triton, which `make test` puts on the path for this folder alone."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
