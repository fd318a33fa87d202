"""The console script `vqserve-ops`: a table of subcommands, each imported only when it is used."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from vqserve.format.errors import CheckpointError, UsageError
from vqserve_ops import __version__
from vqserve_ops.errors import FailedError

COMMANDS = {
    "stage": ("vqserve_ops.stage.command", "fetch a checkpoint into a folder, resumably, and check every byte of it"),
    "preflight": ("vqserve_ops.preflight", "run `vqserve preflight` as a Job where the engine would run"),
    "rollout": ("vqserve_ops.rollout.command", "wait until a release serves, and say in words what keeps it from it"),
    "drain": ("vqserve_ops.drain", "take one pod out of rotation, and wait for its running requests"),
    "support-bundle": ("vqserve_ops.bundle.command", "collect what explains a release, without its secrets"),
}
"""Per subcommand a module with `add_arguments(parser)` and `run(args) -> int`, and one line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        Exit code: 0 done, 1 it could not be done, 2 bad input (one line on stderr says what), 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser(arguments[:1]).parse_args(arguments)
    before = signal.signal(signal.SIGTERM, _interrupt)  # also as process 1 of a container, which has no default for it
    try:
        code: int = import_module(COMMANDS[args.command][0]).run(args)
        return code
    except FailedError as error:
        print(f"vqserve-ops: error: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, UsageError, OSError) as error:
        print(f"vqserve-ops: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _parser(chosen: Sequence[str]) -> argparse.ArgumentParser:
    """The parser with the options of `chosen` alone: others would have to import the Kubernetes client."""
    parser = argparse.ArgumentParser(prog="vqserve-ops", description="Looks after vqserve on Kubernetes.")
    parser.add_argument("--version", action="version", version=f"vqserve-ops {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in chosen:
            import_module(module).add_arguments(command)
    return parser
