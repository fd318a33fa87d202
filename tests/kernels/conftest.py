"""Most kernels need Triton, which `make test` puts on the path for this folder alone."""

from __future__ import annotations

from importlib.util import find_spec

_WITH_TRITON = ["test_compile.py", "test_cuda.py", "test_triton.py"]

collect_ignore_glob = [] if find_spec("triton") else _WITH_TRITON
