"""What of the software shapes an encode's results: its own code, and the libraries and device that compute."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch

import vqserve

_PACKAGES = ("encode", "format", "reference")


def software(device: torch.device) -> dict[str, str]:
    """Digest of the sources, versions of the libraries, and the device: results for another one are not taken over."""
    digest = hashlib.sha256()
    root = Path(vqserve.__file__).parent
    for path in sorted(path for package in _PACKAGES for path in (root / package).glob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "code": digest.hexdigest(),
        "libraries": ", ".join(f"{library} {version(library)}" for library in ("torch", "transformers", "tokenizers")),
        "device": f"{device.type}: {name}",
    }
