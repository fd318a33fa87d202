"""`vqserve preflight`: a table of what could keep this machine from serving, and the settings to change."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from vqserve.arguments import positive
from vqserve.format.atomic import write_whole
from vqserve.format.errors import CheckpointError, UsageError
from vqserve.installation import check_vllm
from vqserve.preflight import checks
from vqserve.preflight.collective import all_reduce
from vqserve.preflight.findings import Finding, Verdict
from vqserve.preflight.node import Driver, driver
from vqserve.serve import add_server_arguments, check_memory, prepare
from vqserve.tables import PLAIN_WIDTH, check_targets, write_json

_MESSAGE_BYTES = 4096
"""What Kubernetes keeps of a termination message."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options: those of `vqserve serve`, so that the very server is judged that will be started."""
    parser.usage = "vqserve preflight [PATH] [options] [options of vqserve serve] [-- options of vLLM's server]"
    parser.add_argument("path", nargs="?", type=Path, metavar="PATH", help="folder of the checkpoint, if it is here")
    parser.add_argument(
        "--mode", choices=("refuse", "warn"), default="refuse", help="warn: exit code 0 whatever is found"
    )
    parser.add_argument(
        "--product", type=_pattern, metavar="REGEX", help="what the GPUs have to be, such as 'RTX PRO 6000'"
    )
    parser.add_argument(
        "--deadline", type=positive, default=120, metavar="SECONDS", help="of the all-reduce, default: %(default)s"
    )
    parser.add_argument("--message", type=Path, metavar="FILE", help="write what is wrong, in at most 4 KiB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    add_server_arguments(parser)
    parser.epilog = "Exit code 1: it cannot serve so, and the mode is `refuse`."


def run(args: argparse.Namespace) -> int:
    """Looks at everything, and prints it.

    Raises:
        UsageError: An option is wrong, or vLLM is not installed.
    """
    check_targets({"--json": args.json}, [args.path])
    if args.message and (args.message.is_dir() or not args.message.parent.is_dir()):
        raise UsageError(f"--message {args.message}: is a folder, or in none; name a file in a folder that is there")
    findings = list(examine(args))
    show(findings)
    summary = summarized(findings)
    print(summary.partition("\n")[0])
    if args.json:
        write_json(args.json, [_as_json(finding) for finding in findings])
    if args.message:
        write_message(args.message, summary)
    failed = any(finding.verdict is Verdict.FAIL for finding in findings)
    return 1 if failed and args.mode == "refuse" else 0


def examine(args: argparse.Namespace) -> Iterator[Finding]:
    """Everything that could keep the server from serving, the cheap first."""
    vllm = check_vllm()
    yield Finding("vLLM", Verdict.OK, vllm)
    ranks = args.tensor_parallel_size
    found = None if vllm.endswith("+cpu") else driver()
    if not vllm.endswith("+cpu"):
        yield from checks.check_gpus(found, ranks, args.product)
    yield from checks.check_folders(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"))
    yield from _check_server(args)
    if ranks == 1:
        return
    if found is None and not vllm.endswith("+cpu"):
        return
    yield from _check_ranks(ranks, found, args.deadline)


def _check_server(args: argparse.Namespace) -> Iterator[Finding]:
    """What `vqserve serve` would check."""
    if args.path is None:
        yield Finding("checkpoint", Verdict.UNKNOWN, "none given", "name its folder to have it checked")
        return
    try:
        server = prepare(args)
        yield Finding("checkpoint", Verdict.OK, f"{args.path}: manifest, headers, shapes and codebooks are right")
        check_memory(args, server)
        yield Finding("memory", Verdict.OK, "weights and a full context fit")
    except (CheckpointError, UsageError) as error:
        problem, _, remedy = str(error).rpartition("; ")
        yield Finding("to be served", Verdict.FAIL, problem or remedy, remedy if problem else "")


def _check_ranks(ranks: int, found: Driver | None, deadline: float) -> Iterator[Finding]:
    gpus = found.gpus[:ranks] if found else ()
    if found and len(gpus) < ranks:
        return
    yield from checks.check_paths(gpus) if gpus else ()
    trial = all_reduce(ranks, "nccl" if gpus else "gloo", deadline)
    second = None
    if trial.problem is not None and gpus and os.environ.get("NCCL_P2P_DISABLE") != "1":
        second = all_reduce(ranks, "nccl", deadline, checks.NO_PEERS)
    yield from checks.check_all_reduce(trial, second, gpus)


def show(findings: Sequence[Finding]) -> None:
    """Prints one line per finding, and what to do about it below it."""
    width = max(len(finding.what) for finding in findings)
    console = Console(width=None if os.isatty(1) else PLAIN_WIDTH, markup=False, highlight=False, soft_wrap=True)
    for finding in findings:
        console.print(f"{finding.verdict.value:<8} {finding.what:<{width}}  {finding.found}")
        if finding.remedy:
            console.print(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    if settings := settings_of(findings):
        console.print(f"settings: {settings}")


def settings_of(findings: Sequence[Finding]) -> str:
    """Variables and arguments of vLLM to set because of what was found, as a shell would take them."""
    environment: dict[str, str] = {}
    arguments: dict[str, None] = {}
    for finding in findings:
        environment |= finding.environment
        arguments |= dict.fromkeys(finding.arguments)
    words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*words, *(("vqserve serve ... --", *arguments) if arguments else ())])


def summarized(findings: Sequence[Finding]) -> str:
    """What is wrong, the worst first, and how much else was looked at."""
    counts = Counter(finding.verdict for finding in findings)
    lines = [
        f"preflight: {counts[Verdict.FAIL]} failed, {counts[Verdict.WARN]} to be warned of, "
        f"{counts[Verdict.UNKNOWN]} not visible from here, {counts[Verdict.OK]} right"
    ]
    for verdict in (Verdict.FAIL, Verdict.WARN):
        for finding in findings:
            if finding.verdict is verdict:
                remedy = f" -> {finding.remedy}" if finding.remedy else ""
                lines.append(f"{verdict.value}: {finding.what}: {finding.found}{remedy}")
    if settings := settings_of(findings):
        lines.append(f"settings: {settings}")
    return "\n".join(lines)


def write_message(path: Path, summary: str) -> None:
    """Writes the summary where Kubernetes looks for a container's last words, into the file if it is there already."""
    text = summary.encode()[:_MESSAGE_BYTES].decode(errors="ignore")
    if path.exists():
        path.write_text(text, encoding="utf-8")  # a mount: it cannot be replaced
    else:
        write_whole(path, text)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def _as_json(finding: Finding) -> Mapping[str, object]:
    return {**vars(finding), "verdict": finding.verdict.value.lower(), "arguments": list(finding.arguments)}
