"""``python -m gws_compile``."""

import sys

from .command_line.cli import main

sys.exit(main())
