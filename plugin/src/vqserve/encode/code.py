"""What of the software shapes an encode's results: its own code, and the libraries and device that compute."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch

import vqserve

ELSEWHERE = ("bench", "capacity.py", "checkpoint", "cli.py", "cpu.py", "evaluate", "kernels", "serve.py", "vllm_plugin")
"""What of vqserve an encode does not run. All else counts: what is forgotten here costs work, never a wrong result."""
_LIBRARIES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")


def software(device: torch.device) -> dict[str, str]:
    """Digest of the sources, versions of the libraries, and the device: results for another one are not taken over."""
    digest = hashlib.sha256()
    root = Path(vqserve.__file__).parent
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if place.parts[0] not in ELSEWHERE:
            digest.update(f"{place}\0".encode() + path.read_bytes() + b"\0")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "code": digest.hexdigest(),
        "libraries": ", ".join(f"{library} {version(library)}" for library in _LIBRARIES),
        "device": f"{device.type}: {name}",
    }
