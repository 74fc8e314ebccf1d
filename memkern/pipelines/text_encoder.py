"""The text encoder's site: a hook on its embedding layer, where the pads' ids are swapped.

Swapping there, and not in the ids that the encoder gets, leaves the pooled output alone: CLIP finds its EOT
in the ids that it was called with. A hook calls the module, so offloaded weights and adapters keep working.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from . import encoding
from .hooks import nothing
from .slots import Slot

if TYPE_CHECKING:
    from .instance import Patch


class PadSwapHook:
    """A forward pre-hook that shows the ids to the current encoding and passes on what it returns.

    Outside any encoding it is not known what is encoded, and the `Patch` that owns the hook is told.
    """

    def __init__(self, owner: Patch, slot: Slot) -> None:
        self.owner = owner
        self.slot = slot

    # Traced, it would record the first prompt for all that follow.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        now = encoding.current()
        if now is None:
            self.owner.called_outside()
            return None
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if now.owner is not self.owner or input_ids is None:
            return None
        return args[1:], {**kwargs, "input_ids": now.observe(self.slot, input_ids)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copied with its pipeline it is that of the copied patch. An encoder that is copied alone is not patched."""
        if id(self.owner.pipe) not in memo:
            return nothing
        return PadSwapHook(copy.deepcopy(self.owner, memo), copy.deepcopy(self.slot, memo))
