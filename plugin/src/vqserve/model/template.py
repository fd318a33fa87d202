"""Whether a chat template is one, as transformers compiles it: rendering is for the server."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vqserve.format.errors import CheckpointError

_RESTORE = "restore the file from where the checkpoint came from, or correct it"


class _Generation(Extension):
    """`{% generation %}`, with which templates mark the model's own words."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_template(path: Path) -> None:
    """Compiles a chat template, if there is one.

    Raises:
        CheckpointError: It is no UTF-8, or not valid Jinja.
    """
    if not path.is_file():
        return
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    try:
        environment.from_string(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as cause:
        problem = f"expected UTF-8, found byte {cause.object[cause.start]:#04x} at {cause.start}"
        raise CheckpointError(str(path), problem, _RESTORE) from cause
    except TemplateSyntaxError as cause:
        raise CheckpointError(
            str(path), f"expected a Jinja template, found an error: {cause.message}", _RESTORE
        ) from cause
    except (RecursionError, MemoryError, SyntaxError, ValueError) as cause:  # of Python's compiler, which jinja2 calls
        raise CheckpointError(
            str(path), "expected a Jinja template, found one that does not compile", _RESTORE
        ) from cause
