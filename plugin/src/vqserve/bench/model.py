"""`vqserve bench model`: a whole model of made-up weights at GLM-5.2's sizes, decoded by vLLM."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vqserve.bench.engine import Request
from vqserve.checkpoint.assume import assumed
from vqserve.format.errors import UsageError
from vqserve.format.memory import memory

ENGINE_SECONDS = 1800
OURS, STOCK, ALONE = "vqserve", "stock 4 bit", "one rank alone"
"""Names of runs."""
STOCK_SHARE, ALONE_SHARE, EQUAL_SHARES = 0.95, 0.85, 0.01
"""What `targets` asks."""
GROUPS = {
    "all-reduce": r"all_?reduce|cross_device_reduce|ncclDevKernel",
    "router": r"topk|grouped_topk|sigmoid",
    "experts": r"^(gate_up|down|finish|group|to_half|combine)$|moe|count_and_sort",
    "4-bit linears": r"marlin|machete|gptq|device_kernel.*[Mm]ixed",
    "attention": r"mla|attention|_fwd_kernel|_fwd_grouped|flash|concat_and_cache",
    "bf16 products": r"gemm|gemv|bmm|nvjet|cutlass|cublas|splitK",
    "norms, SiLU, rotation": r"norm|silu|act_and_mul|rotary|rope",
}
"""Kernels of a decode step by what they are for; the first pattern that is found counts."""
SHARED_OUT = ("num_attention_heads", "num_key_value_heads", "moe_intermediate_size", "intermediate_size", "vocab_size")
"""What tensor-parallel ranks share, of a configuration."""


def vq_config(config: Mapping[str, Any], mix: Mapping[str, float], layers: int, of_ranks: int) -> dict[str, Any]:
    """The configuration to serve: fewer layers, one rank's share, experts in tiers and a 4-bit spine.

    Args:
        config: GLM-5.2's.
        mix: Shares of the tiers.
        layers: How many to keep.
        of_ranks: The model is what one of so many tensor-parallel ranks computes.

    Raises:
        UsageError: The sizes cannot be shared so.
    """
    return assumed(_reduced(config, layers, of_ranks), mix)


def stock_config(config: Mapping[str, Any], layers: int, of_ranks: int, experts: int) -> dict[str, Any]:
    """The same with every linear layer and expert in vLLM's own 4 bit, of fewer experts: all of them do not fit."""
    reduced = {**_reduced(config, layers, of_ranks), "n_routed_experts": experts}
    spared: dict[str, Any] = {r"-:.*(lm_head|kv_b_proj|\.gate$|indexer).*": {}}
    return {
        **reduced,
        "quantization_config": {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "sym": True,
            "desc_act": False,
            "dynamic": spared,
        },
    }


def _reduced(config: Mapping[str, Any], layers: int, of_ranks: int) -> dict[str, Any]:
    if not config["first_k_dense_replace"] < layers <= config["num_hidden_layers"]:
        low, high = config["first_k_dense_replace"] + 1, config["num_hidden_layers"]
        raise UsageError(f"--layers {layers}: expected {low} to {high}")
    for key in SHARED_OUT:
        if config[key] % of_ranks:
            raise UsageError(f"--rank-of {of_ranks}: {key} {config[key]} does not divide into so many; try 2 or 4")
    shares = {key: config[key] // of_ranks for key in SHARED_OUT}
    return {**config, **shares, "num_hidden_layers": layers, "num_nextn_predict_layers": 0}


def run_engine(config: Mapping[str, Any], **asked: Any) -> dict[str, Any]:
    """Measures one configuration in a process of its own.

    Args:
        config: To serve.
        asked: The attributes of `Request` but the folder.

    Raises:
        UsageError: The engine did not get through; its last lines are in the message.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "request.json").write_text(json.dumps(asdict(Request(folder=name, **asked))), encoding="utf-8")
        command = [sys.executable, "-m", "vqserve.bench.engine", "request.json", "result.json"]
        defaults = {"VLLM_PLUGINS": "vqserve", "VLLM_USE_BREAKABLE_CUDAGRAPH": "1", "HF_HUB_OFFLINE": "1"}
        defaults |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        if asked["ranks"] == 1:
            defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        with (folder / "log").open("w+", encoding="utf-8") as log:
            try:
                done = subprocess.run(
                    command, cwd=folder, env=defaults | os.environ, stdout=log, stderr=log, timeout=ENGINE_SECONDS
                )
                code = str(done.returncode)
            except subprocess.TimeoutExpired:
                code = f"nothing after {ENGINE_SECONDS} s"
        if not (folder / "result.json").exists():
            lines = (folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()
            kept = Path(tempfile.gettempdir()) / "vqserve-bench-engine.log"
            kept.write_text("\n".join(lines), encoding="utf-8")
            errors = [line for line in lines if re.search(r"\w(Error|Exception)\b", line)] or lines or [""]
            raise UsageError(f"the engine ended with {code}: {errors[-1].strip()[:300]}; all it said is in {kept}")
        found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    found["groups"] = grouped(found["kernels"])
    return found


def grouped(kernels: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Calls and microseconds per decode step of each of `GROUPS`, and of all other kernels."""
    groups: dict[str, dict[str, float]] = {name: {"calls": 0.0, "us": 0.0} for name in (*GROUPS, "other")}
    for kernel, (calls, us) in kernels.items():
        name = next((name for name, pattern in GROUPS.items() if re.search(pattern, kernel)), "other")
        groups[name]["calls"] += calls
        groups[name]["us"] += us
    return groups


def floors(config: Mapping[str, Any], ranks: int, copy: float) -> dict[str, float]:
    """Microseconds that each group's weights take to be read once at `copy` bytes per second, one token, one rank.

    Args:
        config: As served.
        ranks: Tensor-parallel ranks that serve it.
        copy: Bytes per second.
    """
    weights = memory(config, ranks=ranks).weights
    held = Counter(weights.split) + Counter(weights.whole)
    share = config["num_experts_per_tok"] / config["n_routed_experts"]
    nbytes = {
        "experts": share * sum(held[f"experts: {plane}"] for plane in ("codes", "refinement", "scales")),
        "4-bit linears": held["spine: 4 bit"],
        "bf16 products": held["kv_b_proj"] + held["router"] + held["lm_head"],
    }
    return {group: size / copy * 1e6 for group, size in nbytes.items()}


def targets(runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the runs measured together are held to: a single stream at the first context, and equal shares of weights.

    Args:
        runs: What `run_engine` found, by name: `OURS`, and beside it `STOCK` or `ALONE` or neither.

    Returns:
        Per target `text`, `limit`, `found` and whether it is `met`.
    """
    ours = runs[OURS]
    first = next(iter(ours["seconds per step"]))
    held = ours["weight bytes per rank"]
    judged: list[dict[str, Any]] = []
    for other, limit in ((STOCK, STOCK_SHARE), (ALONE, ALONE_SHARE)):
        if other in runs:
            share = runs[other]["seconds per step"][first] / ours["seconds per step"][first]
            text = f"{first}: speed over that of {other}, at least"
            judged.append({"text": text, "limit": limit, "found": share, "met": share >= limit})
    if len(held) > 1:
        spread = max(held) / min(held) - 1
        text = "weights of the fullest rank over those of the emptiest, less 1, at most"
        judged.append({"text": text, "limit": EQUAL_SHARES, "found": spread, "met": spread <= EQUAL_SHARES})
    return judged
