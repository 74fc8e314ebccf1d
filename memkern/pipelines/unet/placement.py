"""memkern's processors in the layers of a UNet: put in, taken out, and looked for."""

from __future__ import annotations

from typing import Any

from ..attention.layer import Layer
from .branches import SelfAttentionProcessor, first_self_attention, is_plain
from .kv_stage import RowEdits
from .layers import cross_attention_layers, is_known
from .processor import Computes, CrossAttentionProcessor, former_of, is_ours, replacement
from .schedule import Place


class Processors:
    """The processors that were put into one UNet or ControlNet."""

    def __init__(self) -> None:
        self._placed: list[tuple[Any, CrossAttentionProcessor]] = []
        self._first: tuple[Any, SelfAttentionProcessor] | None = None

    def place(self, module: Any, site: Computes, prefix: str) -> None:
        """Put a processor into each cross-attention layer whose own processor is known."""
        for name, attn in cross_attention_layers(module):
            processor = attn.processor
            if not is_known(attn) or (is_ours(processor) and processor.site is site):
                continue
            ours = replacement(former_of(processor), site, prefix + name, attn)
            attn.set_processor(ours)
            self._placed = [kept for kept in self._placed if kept[0] is not attn] + [(attn, ours)]
        found = first_self_attention(module)
        if found is not None and is_plain(found[1]) and not is_ours(found[1].processor):
            name, attn = found
            once = SelfAttentionProcessor(attn.processor, site, prefix + name, attn)
            attn.set_processor(once)
            self._first = attn, once

    def take_out(self, module: Any, site: Computes) -> None:
        """Put back the same processors that were there, where ours still are."""
        for attn in module.modules():
            if is_ours(getattr(attn, "processor", None)) and attn.processor.site in (site, None):
                attn.set_processor(former_of(attn.processor))
        self._placed, self._first = [], None

    def leave_compiled_blocks(self, module: Any) -> None:
        """Leave the self-attention of a block that has been compiled alone since: it shares its graph with others."""
        if self._first is not None and first_self_attention(module) is None:
            attn, once = self._first
            if attn.processor is once:
                attn.set_processor(once.former)
            self._first = None

    @property
    def count(self) -> int:
        """The number of them that are still in place."""
        return sum(attn.processor is processor for attn, processor in self._placed)

    @property
    def projections(self) -> list[Any]:
        """The projections of the layers that they were put into."""
        placed = [*self._placed, *([] if self._first is None else [self._first])]
        return [part for attn, ours in placed for part in Layer(attn, ours.former).modules.values()]

    @property
    def exchanged(self) -> list[str]:
        """The layers whose processors were replaced since."""
        return [processor.name for attn, processor in self._placed if attn.processor is not processor]


def foreign(module: Any) -> list[str]:
    """The classes of processors that stay, since their computation is not known; none where the module is gone."""
    layers = [] if module is None else cross_attention_layers(module)
    return [type(former_of(attn.processor)).__name__ for _, attn in layers if not is_known(attn)]


def missed_layers(
    module: Any, prefix: str, edits: RowEdits, place: Place, reached: set[str], causes: dict[str, str]
) -> dict[str, str]:
    """The layers that a call of `module` should have edited and did not, each with the cause.

    Args:
        edits: those of the rows that it was called with.
        place: that of the call.
        reached: the layers that were edited, by prefixed name.
        causes: why some were not, where that is known.
    """
    missed = {}
    for name, attn in cross_attention_layers(module):
        name = prefix + name
        if name in reached or not edits.wanted(name, place):
            continue
        cause = causes.get(name)
        if cause is None and not is_ours(attn.processor):
            cause = f"its processor was replaced by {type(attn.processor).__name__} since it was patched"
        elif cause is None and "forward" in vars(attn):
            cause = "its forward was replaced"
        missed[name] = cause or "its processor was not called"
    return missed
