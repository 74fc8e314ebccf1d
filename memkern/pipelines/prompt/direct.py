"""A user's own text-encoder calls, which count as encoding prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ...policy import Branch
from ..session import Session
from .encode_prompt import edit_rows, note
from .encoding import Encoding, entered


@contextmanager
def directly(session: Session, branch: Branch) -> Iterator[Callable[..., torch.Tensor]]:
    """Record the text-encoder calls inside, and swap their pads; see `Patch.encoding`.

    Yields:
        A function from embeddings `[B, L, D]` made inside, and their ids `[B, L]` where needed, to edited embeddings.
    """
    owner, policy = session.patch, session.settings.policy
    seen = Encoding(session.pipe, owner.slots, policy, policy.reembed_pads)
    with entered(seen):

        def edited(embeds: torch.Tensor, input_ids: torch.Tensor | None = None) -> torch.Tensor:
            windows = embeds.shape[1] // owner.context_length
            if input_ids is None:
                calls = [seen.last(slot, windows) for slot in owner.slots]
            else:
                calls = [seen.given(slot, input_ids, windows) for slot in owner.slots]
            made, rows = edit_rows(session, embeds, calls, branch)
            note(session, made, branch, rows)
            return made

        yield edited
