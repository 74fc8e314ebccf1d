"""The work of a UNet's cross-attention layers on a context: done once per context, and kept.

The context does not change over the denoising steps, so a layer that sees one a second time computes its K and V,
or with the weights of all four projections A and VO (`absorbed_attention`), and keeps them until the context
dies or changes, or the weights change. At the kv stage they include a policy's edits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from ...ledger import LEDGER, KnownRows
from ...seen import Seen
from ..attention.budget import allot
from ..attention.choose import Prepared, prepare, wish
from ..attention.layer import Images, Layer
from ..attention.paths import compute_dtype, projected
from ..attention.sources import Source, unedited
from ..family import outputs
from ..session import Session
from .kv_stage import Active, RowEdits
from .ready import Ready

Key = tuple[int, torch.dtype, Active]
"""The key of a kept result: the layer, the dtype of its products, and the edits in force."""


class Context:
    """One context: its rows, the layers that saw it, and their results.

    Attributes:
        rows: the description of each row; None until they are looked up.
        edits: the edits of their keys and values.
        is_edited: whether there are any.
        is_counted: whether its rows have been counted as having reached the UNet.
        ready: by a layer's id, its work from now on.
    """

    def __init__(self, tensor: torch.Tensor, forget: Callable[[Any], None] | None = None) -> None:
        self.seen = Seen(tensor, forget)
        self.rows: KnownRows | None = None
        self.edits: RowEdits | None = None
        self.is_edited = False
        self.is_counted = False
        self._sources: dict[Active, Source | None] = {}
        self._visited: dict[Key, tuple[Layer, torch.Size]] = {}
        self._rooms: dict[Hashable, int] = {}
        self._prepared: dict[Key, Prepared] = {}
        self.ready: dict[int, Ready] = {}

    def recognise(self, tensor: torch.Tensor, session: Session, *, direct: bool = False) -> None:
        """Look up the descriptions of its rows: by identity, else by value.

        Args:
            direct: whether each row follows its own policy, and not the session's.
        """
        self.rows = LEDGER.recall(tensor, session.rows, session.rank, outputs.order(session.pipe))
        policy = session.settings.policy
        own = self.rows if direct else [row if row and row.policy == policy else None for row in self.rows]
        self.edits = RowEdits(self.rows, tuple(own))
        self.is_edited = bool(self.edits)

    def know_nothing(self, rows: int) -> None:
        """Take its rows as those of no patched pipeline."""
        self.rows = (None,) * rows
        self.edits = RowEdits(self.rows, self.rows)

    def attend(
        self, layer: Layer, x: torch.Tensor, tensor: torch.Tensor, images: Images | None, active: Active,
        session: Session, *, keep: bool, by_value: bool = True,
    ) -> tuple[torch.Tensor | None, Prepared | None, bool]:  # fmt: skip
        """A layer's output, None where its own processor is to compute it; its `Prepared`, or None; and whether that is
        new.

        Args:
            active: the edits in force; empty for none.
            session: that of the call.
            keep: whether results from the context may be kept for the next step.
            by_value: whether the weights' values are compared even where torch counts writes to them.
        """
        backend = session.settings.backend
        source = self._source(tensor, active, backend) if active else None
        key = id(layer.attn), compute_dtype(x), () if source is None else active
        if not keep or key not in self._visited:
            self._visited[key] = layer, x.shape
            if source is None:
                return None, None, False
            return projected(layer, source, backend)(x, tensor, images), None, False
        prepared, is_new = self._prepared.get(key), False
        if prepared is None or not prepared.valid(layer, by_value=by_value):
            source, chooser = source or self._whole(tensor), session.patch.family.chooser
            room = self._room(key, x, source, tensor, session)
            prepared, is_new = prepare(layer, x, source, tensor, backend, chooser, room), True
            self._prepared[key] = prepared
        return None if prepared.attend is None else prepared.attend(x, tensor, images), prepared, is_new

    def _source(self, tensor: torch.Tensor, active: Active, backend: str) -> Source | None:
        """The context under the edits that are in force; None where they leave all its rows alone."""
        if active not in self._sources:
            assert self.edits is not None
            self._sources[active] = self.edits.source(tensor, active, backend)
        return self._sources[active]

    def _room(self, key: Key, x: torch.Tensor, source: Source, tensor: torch.Tensor, session: Session) -> int:
        """The bytes that a layer may keep, of those for all layers that saw the context before it was seen again."""
        if key not in self._rooms:
            wishes = []
            for other, (layer, shape) in self._visited.items():
                if other not in self._rooms and other[1:] == key[1:]:
                    wishes.append(wish(layer, x.new_empty(()).expand(shape), source, tensor.shape[-1], other))
            self._rooms |= allot(wishes, session.room(x.device))
        return self._rooms[key]

    def _whole(self, tensor: torch.Tensor) -> Source:
        found = self._sources.get(())
        if found is None:
            found = self._sources[()] = unedited(tensor)
        return found

    @property
    def size(self) -> int:
        """Bytes kept."""
        return sum(prepared.size for prepared in self._prepared.values())


class Contexts:
    """The contexts that one request gave one UNet."""

    def __init__(self) -> None:
        self._contexts: dict[Hashable, Context] = {}

    def of(self, tensor: torch.Tensor) -> Context:
        """The `Context` of this very tensor, unwritten since; a new one if there is none."""
        key = Seen.key(tensor)
        known = self._contexts.get(key)
        if known is not None and known.seen.is_still(tensor):
            return known

        def forget(reference: Any) -> None:
            kept = self._contexts.get(key)
            if kept is not None and kept.seen.reference is reference:
                self._contexts.pop(key, None)

        known = self._contexts[key] = Context(tensor, forget)
        return known

    @property
    def size(self) -> int:
        """Bytes kept."""
        return sum(context.size for context in tuple(self._contexts.values()))

    def __len__(self) -> int:
        return len(self._contexts)
