"""Has vLLM take this CPU for one without AVX-512. Python imports this at its start if the folder is on PYTHONPATH.

vLLM asks torch for the CPU's capabilities when it chooses one of its libraries; there is no setting for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

_ask_the_cpu = torch.cpu.get_capabilities


@cache
def _up_to_avx2() -> Mapping[str, Any]:
    absent = ("avx512", "avx10", "amx")
    return {name: False if name.startswith(absent) else value for name, value in _ask_the_cpu().items()}


torch.cpu.get_capabilities = _up_to_avx2
