"""The command line, `memkern COMMAND`: arguments in `parser`, the commands in `commands`."""

from __future__ import annotations

from collections.abc import Sequence

from .commands import COMMANDS
from .parser import parser
from .quiet import hush

__all__ = ["main", "parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = parser().parse_args(arguments)
    if options.command not in ("info", "presets"):
        hush()
    return COMMANDS[options.command](options)
