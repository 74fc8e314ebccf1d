"""The command line, `memkern COMMAND`: each command's arguments in `parser`, what it does in `commands`."""

from __future__ import annotations

from collections.abc import Sequence

from .commands import COMMANDS
from .parser import parser

__all__ = ["main", "parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = parser().parse_args(arguments)
    return COMMANDS[options.command](options)
