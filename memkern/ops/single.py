"""One copy of memkern in a process: torch takes an operator's definition once, but kernels from the last copy.

Imported before anything is registered: a second copy is refused while the kernels of the first are in use.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch


def registered_from() -> str | None:
    """The folder of the memkern whose operators torch knows; None if it knows none."""
    dump: str = torch._C._dispatch_dump("memkern::edit_embeds")
    if not dump:
        return None
    found = re.search(r"registered at (.+)[/\\]ops[/\\]library\.py", dump)
    return found[1] if found else "an unknown place"


def refuse_second_copy() -> None:
    """Raise ImportError if a memkern was imported in this process before."""
    first, second = registered_from(), str(Path(__file__).parents[1])
    if first is None:
        return
    if Path(first) == Path(second):
        raise ImportError(
            f"memkern: {second} is imported a second time in one process, which torch's operators do not allow: keep "
            "its modules in sys.modules, or start a new process"
        )
    raise ImportError(
        f"memkern: {second} is a second copy in one process, where {first} was imported before and stays in force: "
        "remove one of the two, or import them in separate processes"
    )


refuse_second_copy()
