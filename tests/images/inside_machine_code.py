"""Run in the image: the chips that vLLM's extensions and our cubins hold machine code for, one line for each file."""

from __future__ import annotations

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path


def folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


if __name__ == "__main__":
    tool = folder("triton") / "backends" / "nvidia" / "bin" / "cuobjdump"
    for file in sorted(folder("vllm").glob("*.so")):
        done = subprocess.run([tool, "--list-elf", file], capture_output=True, text=True, check=False)
        print(file.name, *sorted(set(re.findall(r"\bsm_\d+a?f?\b", done.stdout))))  # noqa: T201 - the result
