"""The command line, `memkern COMMAND`: arguments in `parser`, the commands in `commands`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .commands import COMMANDS
from .parser import parser
from .quiet import hush

__all__ = ["main", "parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 1 if nobody reads its output to the end."""
    options = parser().parse_args(arguments)
    if options.command not in ("info", "presets"):
        hush()
    try:
        status = COMMANDS[options.command](options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Otherwise Python writes to the closed pipe again when it ends, and reports that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
