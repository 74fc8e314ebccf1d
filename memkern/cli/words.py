"""A parser of arguments that guesses the right name for a misspelt one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """`argparse`'s parser, with "did you mean …?" for commands and options; no option is abbreviated."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{"allow_abbrev": False, **options})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Exit with the message, and a guess if there is one."""
        found = re.search(r"invalid choice: '(.*?)'|unrecognized arguments: .*?(--[\w-]+)", message)
        near = get_close_matches(found[1] or found[2], list(self._names()), n=1) if found else []
        super().error(f"{message}; did you mean {near[0]}?" if near else message)

    def _names(self) -> Iterator[str]:
        """The names of all commands and options, also of the commands' options."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for name, inner in action.choices.items():
                    yield name
                    yield from inner._names()
