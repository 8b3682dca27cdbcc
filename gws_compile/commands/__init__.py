"""The subcommands of ``gws``, one module each.

A command's module has ``add_to(commands)``, which adds its parser and sets ``function``, what is called with the parsed
arguments and returns the exit code.
"""

from . import explain, run

COMMANDS = (run, explain)
