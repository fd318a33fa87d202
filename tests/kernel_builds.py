"""Compiles every Triton configuration that ships for two chips, without a GPU; prints what each build uses as JSON."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vqserve.kernels.vq_gemm import triton as kernels

POINTERS = {
    **dict.fromkeys(["x", "h", "codebooks"], "*i64"),
    **dict.fromkeys(["codes", "refinements"], "*u8"),
    **dict.fromkeys(["weights", "products", "factors", "h_factors"], "*fp32"),
    **dict.fromkeys(["ids", "expert_map", "places", "order", "experts", "firsts", "lasts"], "*i32"),
    "scales": "*fp16",
}


def builds() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, pointer types of its own, constants and options."""
    for dtype in ("bf16", "fp16", "fp32"):
        for mapped in (False, True):
            constants = {"MAPPED": mapped, "ROWS": kernels.ROWS, "num_warps": 1}
            yield f"combine {dtype} {mapped}", kernels.combine, {"out": f"*{dtype}"}, constants
        pointers = {"x": f"*{dtype}", "y": "*fp16"}
        yield f"to_half {dtype}", kernels.to_half, pointers, {"BLOCK": 8192, "num_warps": kernels.WARPS}
    for tokens in kernels.TOKENS:
        constants = {"TOKENS": tokens, "ROWS": kernels.ROWS, "num_warps": kernels.WARPS, "num_stages": 1}
        yield f"gate_up {tokens}", kernels.gate_up, {"h": "*fp16"}, constants
        yield f"down {tokens}", kernels.down, {}, constants


def build(kernel: Any, own: dict[str, str], constants: dict[str, Any], chip: int) -> dict[str, int]:
    types, options = POINTERS | own, {name: n for name, n in constants.items() if name.startswith("num_")}
    constants = {name: value for name, value in constants.items() if name not in options}
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if name not in constants and name != "top_k"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    done = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = {name.lower(): int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}
    return {**used, "shared": done.metadata.shared}


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    found = {name: build(kernel, own, constants, wanted) for name, kernel, own, constants in builds()}
    print(json.dumps(found))  # noqa: T201 - the result
