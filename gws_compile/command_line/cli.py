"""The command line: ``gws COMMAND ...``, also as ``python -m gws_compile COMMAND ...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import advise, compare, explain, export, run
from .options import Parser, UsageError

COMMANDS = (run, explain, export, compare, advise)
"""The commands, a module each.

A command's module has ``add_to(commands)``, which adds its parser and sets ``function``, what is called with the parsed
arguments and returns the exit code.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those of the process when None.

    Returns:
        The exit code, where the command does not end the process itself. 2 for a wrong command line.
    """
    parser = Parser(
        prog="gws",
        description="Pseudo-quantization training by Gaussian weight sampling, for any model that torch.compile takes.",
        epilog="gws COMMAND --help says more of each.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands.choices[parsed.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(parsed.function(parsed))
    except UsageError as error:
        sys.stderr.write(f"gws {parsed.command}: error: {error}\n")
        return 2
