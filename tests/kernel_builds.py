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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vqserve.kernels.vq_gemm import triton as prefill
from vqserve.kernels.vq_moe import triton as decode

POINTERS = {
    **dict.fromkeys(["x", "places", "order", "starts", "block_expert", "block_first"], "*i64"),
    **dict.fromkeys(["base_a", "base_b", "fine_b", "base_c", "base_d", "fine_d"], "*i64"),
    **dict.fromkeys(["codes", "refinements"], "*u8"),
    **dict.fromkeys(["weights", "products"], "*fp32"),
    **dict.fromkeys(["ids", "expert_map"], "*i32"),
    "scales": "*fp16",
}
NAMES = {tl.bfloat16: "bf16", tl.float16: "fp16"}


def builds() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, pointer types of its own, constants."""
    shape = {"ROWS": decode.ROWS, "GROUPS": decode.GROUPS}
    for dtype, name in NAMES.items():
        for mapped in (False, True):
            constants = {"MAPPED": mapped, "DTYPE": dtype, **shape}
            yield f"decode gate_up {name} {mapped}", decode.gate_up, {"h": "*fp32"}, constants
            constants = {"MAPPED": mapped, **shape}
            yield f"decode down {name} {mapped}", decode.down, {"h": "*i64", "out": f"*{name}"}, constants
            constants = {"MAPPED": mapped, "ROWS": prefill.ROWS}
            yield f"prefill combine {name} {mapped}", prefill.combine, {"out": f"*{name}"}, constants
        for tokens in prefill.TOKENS:
            constants = {"TOKENS": tokens, "ROWS": prefill.ROWS}
            yield f"prefill gate_up {name} {tokens}", prefill.gate_up, {"h": "*fp32"}, {**constants, "DTYPE": dtype}
            if dtype == tl.bfloat16:
                yield f"prefill down {tokens}", prefill.down, {"h": "*i64"}, constants


def build(kernel: Any, own: dict[str, str], constants: dict[str, Any], chip: int) -> dict[str, int]:
    types = POINTERS | own
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if name not in constants and name != "top_k"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    done = triton.compile(source, target=GPUTarget("cuda", chip, 32), options={"num_warps": 4})
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
