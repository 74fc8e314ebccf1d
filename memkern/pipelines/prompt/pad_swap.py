"""The text encoder's site: a hook on its embedding layer, where the pads' ids are swapped.

Swapping there, and not in the ids that the encoder gets, leaves the pooled output alone: CLIP finds its EOT
in the ids that it was called with. With a hook the module is still called, so offloaded weights and adapters work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..holders import Holders, inert, inert_reduced
from ..session import current
from . import encoding


class PadSwapHook:
    """A forward pre-hook that shows the ids to the current encoding and passes on what it returns.

    It serves every patched pipeline that has this encoder. Outside any encoding the prompt is not known, and each
    holder decides whether that matters: `called_outside()`.
    """

    def __init__(self) -> None:
        self.holders = Holders()
        self.handle: Any = None

    # A traced hook would record the first prompt for all that follow.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        now = encoding.current()
        if now is None:
            session = current()
            inside = session is not None and session.patch in self.holders
            for holder in [session.patch] if session is not None and inside else self.holders.all():
                holder.called_outside()
            return None
        slot = now.slot_of(module)
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if slot is None or input_ids is None:
            return None
        return args[1:], {**kwargs, "input_ids": now.observe(slot, input_ids)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert()

    def __reduce__(self) -> tuple[Any, ...]:
        return inert_reduced()
