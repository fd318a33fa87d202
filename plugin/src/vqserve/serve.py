"""`vqserve serve`: checks a checkpoint and the installation, then becomes vLLM's own OpenAI server.

There is no server of ours: this module builds an environment and an argument list and replaces itself by them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vqserve.arguments import positive, shortened
from vqserve.capacity import available_bytes, check_cpu, check_gpus, gpu_bytes
from vqserve.cpu import Cpu, cores_of_ranks, find_cpu
from vqserve.format.companions import CHAT_TEMPLATE
from vqserve.format.errors import UsageError
from vqserve.format.files import DIGEST_LIMIT, Checkpoint, ParentCheckpoint, check_checkpoint, check_parent, read_config
from vqserve.format.geometry import Geometry
from vqserve.format.known_answers import read_known_answers
from vqserve.format.layout import check_shardable
from vqserve.format.memory import memory
from vqserve.format.variants import check_variant
from vqserve.installation import PLUGINS, check_vllm
from vqserve.settings import (
    ANTI_REPETITION,
    COUNTERS,
    COUNTERS_BYTES,
    SPINE,
    STALL_SECONDS,
    THINKING_BUDGET,
    WARM_UP_SECONDS,
    AntiRepetition,
    anti_repetition,
    api_key,
    stall_seconds,
    thinking_budget,
    warm_up_seconds,
)

DENSE_CONTEXT = 4096
"""Default context of dense attention, in tokens: it is exact up to 2048 and has been validated up to this."""
KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"
"""vLLM's variable for the GiB of each rank's KV cache on a CPU."""

_WHOLE_EXPERTS = {"-ep", "--enable-expert-parallel", "--enable_expert_parallel"}

# The same program as `vllm serve`, whose command line needs a distribution called `vllm`; vllm-cpu is not one.
_SERVER = "vllm.entrypoints.launchers.api_server.entry"
_NETS_OPTION = "--logits-processors"
# For each of vLLM's model runners its own; see `vllm_plugin.nets`.
_NETS = {"cpu": "vqserve.vllm_plugin.nets_cpu:SafetyNets", "cuda": "vqserve.vllm_plugin.nets_gpu:SafetyNets"}

# As far as an option has to be typed for vLLM to know it.
_SECRETS = ("--api-k", "--hf-t", "--ssl-keyfile-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vqserve serve`."""
    parser.usage = "vqserve serve PATH [options] [-- options of vLLM's server]"
    parser.add_argument("path", type=Path, metavar="PATH", help="folder of the checkpoint")
    add_server_arguments(parser)
    parser.add_argument("--print", action="store_true", help="show environment and arguments, start nothing")
    parser.epilog = (
        "The API key, if any, is read from the environment variable VLLM_API_KEY. Every route wants it but "
        "/health, /ping, /ready, /live, /metrics, /version, /load and, from this machine alone, /drain."
    )


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares how a checkpoint is to be served: what `vqserve preflight` takes as well."""
    parser.add_argument("--bf16", action="store_true", help="PATH is an unquantized parent: serve it, to compare with")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all addresses (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8001, help="default: %(default)s")
    parser.add_argument("--served-model-name", default="glm-5.2", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--max-model-len", type=int, metavar="TOKENS", help="default: the model's; dense, at most 4096")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks, default: %(default)s")
    parser.add_argument("--attention", choices=("auto", "dense", "sparse"), default="auto", help="auto means dense")
    parser.add_argument("--reasoning-parser", default="glm45", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--tool-call-parser", default="glm47", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="default: the checkpoint's")
    parser.add_argument(
        "--warm-up-seconds", type=positive, metavar="N", help="how long until /ready gives up (default: 600)"
    )
    parser.add_argument(
        "--stall-seconds", type=positive, metavar="N", help="without a step until /live gives up (default: 120)"
    )
    parser.add_argument(
        "--anti-repetition",
        metavar="STRENGTH[,MIN_LENGTH[,WINDOW]]",
        help="penalise tokens that prolong a repetition of MIN_LENGTH (64) generated tokens or more, STRENGTH logits "
        "per token of it; 0: only where a request asks for it (default: off)",
    )
    parser.add_argument(
        "--thinking-budget",
        type=positive,
        metavar="TOKENS",
        help="close the thinking after so many tokens, where a request does not say (default: no limit)",
    )


@dataclass(frozen=True)
class Server:
    """A server that could be started.

    Attributes:
        vllm: Version of vLLM, with the suffix `+cpu` for a CPU build.
        checkpoint: What it serves.
        cpu: How this machine's CPU serves it; None on GPUs.
        environment: Variables to set.
        command: Program and arguments.
    """

    vllm: str
    checkpoint: Checkpoint | ParentCheckpoint
    cpu: Cpu | None
    environment: Mapping[str, str]
    command: list[str]


def run(args: argparse.Namespace) -> int:
    """Checks everything that can be checked, then replaces this process by the server.

    Raises:
        CheckpointError: The checkpoint or its known answers are damaged, or not such as can be served.
        UsageError: An argument or the installation is wrong.
    """
    server = prepare(args)
    if args.print:
        print(shown(server.environment, server.command))
        return 0
    check_port(args.host, args.port)
    check_memory(args, server)
    print(summary(args, server), flush=True)
    environment = os.environ | server.environment
    if _NETS_OPTION in server.command:
        environment[COUNTERS] = counters_file()
    os.execve(server.command[0], server.command, environment)


def prepare(args: argparse.Namespace) -> Server:
    """Checks what can be checked on any machine that has the checkpoint.

    Raises:
        CheckpointError: The checkpoint or its known answers are damaged, or not such as can be served.
        UsageError: An argument or the installation is wrong.
    """
    vllm = check_vllm()
    checkpoint = check_parent(args.path) if args.bf16 else check_checkpoint(args.path)
    read_known_answers(args.path)
    from vqserve.model.template import check_template  # jinja2 may be missing where vLLM is

    check_template(args.chat_template or args.path / CHAT_TEMPLATE)
    cpu = find_cpu() if vllm.endswith("+cpu") else None
    check_arguments(args, checkpoint, cpu)
    environment = server_environment(args, checkpoint.geometry, cpu)
    return Server(vllm, checkpoint, cpu, environment, server_command(args, checkpoint.geometry, cpu))


def check_arguments(args: argparse.Namespace, checkpoint: Checkpoint | ParentCheckpoint, cpu: Cpu | None) -> None:
    """Checks what argparse cannot.

    Raises:
        UsageError: A value cannot work with this checkpoint or machine.
    """
    whole = bool(_WHOLE_EXPERTS.intersection(args.passed))
    if isinstance(checkpoint, ParentCheckpoint):
        check_variant(read_config(args.path))  # as vLLM will read it, without what the encoder completes
        if checkpoint.fused:
            problem = "experts are stored fused (gate_up_proj), and vLLM reads them one by one"
            raise UsageError(f"{args.path}: {problem}; save the model again in the hub's layout, or encode it")
    spine = checkpoint.quant.spine if isinstance(checkpoint, Checkpoint) else None
    check_shardable(checkpoint.geometry, args.tensor_parallel_size, spine, whole_experts=whole)
    longest = checkpoint.geometry.max_position_embeddings
    if args.max_model_len is not None and not 1 <= args.max_model_len <= longest:
        raise UsageError(f"--max-model-len {args.max_model_len}: expected 1..{longest}, which the model was made for")
    if args.chat_template is not None and not args.chat_template.is_file():
        raise UsageError(
            f"--chat-template {args.chat_template}: no such file; name one, or leave it out for the checkpoint's"
        )
    if cpu and args.attention == "sparse":
        raise UsageError("--attention sparse: vLLM has no sparse attention on CPUs; use dense")
    if args.attention == "sparse" and checkpoint.config.get("indexer_rope_interleave") is not True:
        problem = (
            f"{args.path / 'config.json'} has no indexer_rope_interleave, and vLLM would rotate the indexer wrongly"
        )
        raise UsageError(f"--attention sparse: {problem}; set it to true")
    if not 1 <= args.port <= 65535:
        raise UsageError(f"--port {args.port}: expected 1..65535")
    if args.warm_up_seconds is None:
        warm_up_seconds()
    if args.stall_seconds is None:
        stall_seconds()
    api_key()
    _check_nets(args)
    if cpu:
        _check_on_cpu(args.tensor_parallel_size)


def _check_nets(args: argparse.Namespace) -> None:
    if args.anti_repetition is None:
        anti_repetition()
    else:
        try:
            AntiRepetition.parse(args.anti_repetition)
        except UsageError as error:
            raise UsageError(f"--anti-repetition {shortened(args.anti_repetition)}: {error}") from error
    if args.thinking_budget is None:
        thinking_budget()
    named = [word for word in args.passed if word.replace("_", "-").startswith("--logits-p")]
    if named and _has_nets(args):
        remedy = "name what `vqserve serve --print` shows beside your own, and set the variables it shows"
        raise UsageError(f"{named[0]} would take the place of --anti-repetition and --thinking-budget; {remedy}")


def _has_nets(args: argparse.Namespace) -> bool:
    """Whether a safety net is configured, by an option or by the caller's environment."""
    options = (args.anti_repetition, args.thinking_budget, anti_repetition(), thinking_budget())
    return any(option is not None for option in options)


def _check_on_cpu(ranks: int) -> None:
    cores, space = len(os.sched_getaffinity(0)), os.environ.get(KV_CACHE)
    if ranks > cores:
        raise UsageError(f"--tensor-parallel-size {ranks}: {cores} CPU cores for that many ranks; use at most {cores}")
    if space is not None and re.fullmatch("[0-9]{1,9}", space) is None:
        raise UsageError(f"{KV_CACHE}={space}: expected a whole number of GiB; set it to one, or unset it")


def check_port(host: str, port: int) -> None:
    """Binds the port and lets it go again, so that a taken one is found before minutes of loading.

    Raises:
        UsageError: The port is taken, or the address is not one of this machine's.
    """
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        problem = f"cannot listen on {host}:{port}: {error.strerror}"
        raise UsageError(f"{problem}; choose another --port or --host") from error


def check_memory(args: argparse.Namespace, server: Server) -> None:
    """Checks that the model fits, as far as that is known beforehand.

    Raises:
        UsageError: It does not.
    """
    checkpoint, cpu = server.checkpoint, server.cpu
    plan = memory(
        checkpoint.config,
        ranks=args.tensor_parallel_size,
        attention="sparse" if args.attention == "sparse" else "dense",
        platform="cpu" if cpu else "cuda",
        whole_experts=bool(_WHOLE_EXPERTS.intersection(args.passed)),
        dequantized_spine=cpu is not None and cpu.spine == "dequantized",
        element_bytes=4 if cpu and cpu.dtype == "float32" else 2,
        avx512=cpu is not None and cpu.avx512,
        specs=checkpoint.specs if isinstance(checkpoint, Checkpoint) else None,
    )
    tokens = context(args, checkpoint.geometry)
    if cpu:
        check_cpu(plan, tokens, int(server.environment[KV_CACHE]), available_bytes())
    else:
        check_gpus(plan, tokens, args.passed, gpu_bytes())


def server_environment(args: argparse.Namespace, geometry: Geometry, cpu: Cpu | None) -> dict[str, str]:
    """The variables to set for the server: no network, no telemetry, what the platform needs; the caller's own win."""
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if args.attention != "sparse":
        # vLLM's own default for this architecture, which it knows by name: no torch.compile.
        environment["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "1"
    if cpu:
        # Set in any case: without it vLLM wants 92 % of a memory node free, whatever it will use.
        environment[KV_CACHE] = str(_kv_cache_gib(geometry, context(args, geometry), cpu))
        environment[SPINE] = cpu.spine
        # Answering a request for logprobs would compile an operator: ten seconds, and a C++ compiler at run time.
        environment["TORCHDYNAMO_DISABLE"] = "1"
        # AMX CPUs would round the activations of the 4-bit spine to 8 bit; no other device does.
        environment["VLLM_CPU_INT4_W4A8"] = "0"
        if args.tensor_parallel_size > 1:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = cores_of_ranks(args.tensor_parallel_size)
    environment = {name: os.environ.get(name, value) for name, value in environment.items()}
    asked = {
        WARM_UP_SECONDS: args.warm_up_seconds,
        STALL_SECONDS: args.stall_seconds,
        ANTI_REPETITION: args.anti_repetition,
        THINKING_BUDGET: args.thinking_budget,
    }
    environment |= {name: str(value) for name, value in asked.items() if value is not None}
    named = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    return environment | {"VLLM_PLUGINS": ",".join([*PLUGINS, *(name for name in named if name not in PLUGINS)])}


def server_command(args: argparse.Namespace, geometry: Geometry, cpu: Cpu | None) -> list[str]:
    """The program and arguments of the server, those after `--` last and so with the last word."""
    options: dict[str, object] = {
        "--model": args.path,
        "--host": args.host,
        "--port": args.port,
        "--served-model-name": args.served_model_name,
        "--max-model-len": context(args, geometry),
        "--tensor-parallel-size": args.tensor_parallel_size,
        "--reasoning-parser": args.reasoning_parser,
        "--tool-call-parser": args.tool_call_parser,
        "--custom-histogram-buckets": json.dumps({"request_tokens": token_buckets(context(args, geometry))}),
        "--shutdown-timeout": 30,  # seconds for running requests to finish; vLLM's default kills the engine at once
    }
    if cpu:
        options["--dtype"] = cpu.dtype
    if _has_nets(args):
        options[_NETS_OPTION] = _NETS["cpu" if cpu else "cuda"]
    if args.chat_template is not None:
        options["--chat-template"] = args.chat_template
    if args.attention != "sparse":
        options["--hf-overrides"] = json.dumps({"architectures": ["GlmMoeDsaDenseForCausalLM"]})
    command = [sys.executable, "-m", _SERVER, "--enable-auto-tool-choice"]
    command += [text for option, value in options.items() for text in (option, str(value))]
    return [*command, *args.passed]


def counters_file() -> str:
    """Makes the counters that engines write and the API server reads; they last as long as this process does.

    Returns:
        The path by which other processes of this user open them.
    """
    descriptor = os.memfd_create("vqserve-counters", 0)  # without MFD_CLOEXEC, which would close it in the server
    os.truncate(descriptor, COUNTERS_BYTES)
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def context(args: argparse.Namespace, geometry: Geometry) -> int:
    """The context to serve, in tokens."""
    if args.max_model_len is not None:
        return int(args.max_model_len)
    longest = geometry.max_position_embeddings
    return longest if args.attention == "sparse" else min(longest, DENSE_CONTEXT)


def token_buckets(limit: int) -> list[int]:
    """Bounds of a histogram of tokens: powers of two and what lies half-way, up to the longest context."""
    bounds = [step for power in range(4, limit.bit_length()) for step in (1 << power, 3 << (power - 1)) if step < limit]
    return [*bounds, limit]


def shown(environment: Mapping[str, str], command: Sequence[str]) -> str:
    """Environment and command for people to read and shells to run, secrets blotted out."""
    words: list[str] = []
    secret = False
    for word in command:
        option, equals, _ = word.partition("=")
        if option.startswith("--"):
            secret = option.replace("_", "-").startswith(_SECRETS)
            words.append(f"{option}=***" if secret and equals else word)
        else:
            words.append("***" if secret else word)
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(words)])


def summary(args: argparse.Namespace, server: Server) -> str:
    """What was checked, what was chosen for this CPU, and a curl line to paste once the server is up."""
    checkpoint, cpu = server.checkpoint, server.cpu
    if isinstance(checkpoint, Checkpoint):
        size = sum(record.size for record in checkpoint.files.values())
        digests = "sha256, " if size < DIGEST_LIMIT else ""
        checked = f"{len(checkpoint.files)} files, {size / 1e6:.1f} MB, {len(checkpoint.tensors)} tensors; "
        checked += f"manifest, sizes, {digests}headers, shapes and codebooks are right"
    else:
        size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        checked = f"not quantized, {size / 1e6:.1f} MB, {len(checkpoint.tensors)} tensors; headers and shapes are right"
    chosen = ""
    if cpu and cpu.dtype == "float32":
        chosen = "vqserve: this CPU has no instructions for bf16: serving in float32, the 4-bit layers dequantized\n"
    body = json.dumps(
        {"model": args.served_model_name, "messages": [{"role": "user", "content": "12 + 34 = ?"}]}, ensure_ascii=False
    )
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(args.host, args.host)
    host = f"[{host}]" if ":" in host else host
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if api_key() else ""
    return (
        f"vqserve: {args.path}: {checked}\n{chosen}"
        f"vqserve: starting vLLM {server.vllm}; at `Application startup complete`, ask it:\n\n"
        f"curl http://{host}:{args.port}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d {shlex.quote(body)}\n"
    )


def _kv_cache_gib(geometry: Geometry, tokens: int, cpu: Cpu) -> int:
    """GiB of KV cache for four full contexts; vLLM's default would be most of the machine's memory."""
    element = 4 if cpu.dtype == "float32" else 2
    per_token = element * geometry.num_hidden_layers * (geometry.kv_lora_rank + geometry.qk_rope_head_dim)
    return -(-4 * tokens * per_token // (1 << 30))
