"""The console script `vqserve`: a table of subcommands, each imported only when it is used."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from vqserve import __version__
from vqserve.format.errors import CheckpointError, UsageError

COMMANDS = {
    "encode": ("vqserve.encode.command", "quantize a bf16 checkpoint"),
    "inspect": ("vqserve.checkpoint.inspect", "show what a checkpoint holds: tiers, bits per weight, bytes"),
    "verify": ("vqserve.checkpoint.verify", "check all of a checkpoint that can be checked without running it"),
    "plan": ("vqserve.checkpoint.plan", "show whether a model fits on the GPUs, and with how long a context"),
    "card": ("vqserve.checkpoint.card", "write measured scores into a checkpoint's model card"),
    "serve": ("vqserve.serve", "check a checkpoint and serve it with vLLM's OpenAI server"),
    "preflight": (
        "vqserve.preflight.command",
        "check whether this machine can serve a checkpoint, and say what is wrong",
    ),
    "drain": ("vqserve.drain", "take the server on this machine out of rotation, before it is stopped"),
    "bench": (
        "vqserve.bench.command",
        "measure kernels, or a whole model of made-up weights, on the GPU that is there",
    ),
    "eval": ("vqserve.evaluate.command", "measure a served model or a checkpoint"),
}
"""Per subcommand a module with `add_arguments(parser)` and `run(args) -> int`, and one line of help."""

_PASSING = ("serve", "preflight")
"""Those that take arguments of vLLM's after `--`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        Exit code: 0 done, 2 bad input (one line on stderr says what), 130 interrupted; a subcommand may have others.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    own, passed = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        own, passed = arguments[:at], arguments[at + 1 :]
    if sys.stdout is None:  # closed by the caller: whatever is printed goes nowhere
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    try:
        args = _parser(own[:1]).parse_args(own, argparse.Namespace(passed=passed))
        if passed and args.command not in _PASSING:
            raise UsageError(f"`vqserve {args.command}` takes no arguments after `--`; `vqserve serve` does")
        code: int = import_module(COMMANDS[args.command][0]).run(args)
        return code
    except (CheckpointError, UsageError, OSError) as error:
        print(f"vqserve: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser(chosen: Sequence[str]) -> argparse.ArgumentParser:
    """The parser with the options of `chosen` alone: other subcommands would have to import torch to state theirs."""
    parser = argparse.ArgumentParser(prog="vqserve", description=__doc__.partition(":")[2].strip().capitalize())
    parser.add_argument("--version", action="version", version=f"vqserve {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in chosen:
            import_module(module).add_arguments(command)
    return parser
