"""Which row of a UNet's batch is which prompt's: found by comparing it with what was encoded.

Pipelines order the rows of a context in their own ways (classifier-free guidance, several images per prompt, a third
part for perturbed attention or an edited image), so nothing is assumed about where a row stands.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from ..ledger import Edited
from ..policy import Branch

UNCOND_FIRST: tuple[Branch, ...] = ("uncond", "cond")
"""Of rows that are equal on both branches (a negative prompt that is the prompt), the first is taken as uncond."""


@dataclass(frozen=True)
class Encodings:
    """What a pipeline encoded for one branch.

    Attributes:
        embeds: `[B·n, L, D]`, as it left `encode_prompt`.
        known: roles and the rest.
    """

    embeds: torch.Tensor
    known: Edited

    def prompt_of(self, row: int) -> int:
        """Of which of the B prompts row `row` is an image."""
        return row // max(1, self.embeds.shape[0] // max(1, self.known.roles.shape[0]))

    def roles_of(self, row: int) -> torch.Tensor:
        """uint8 `[1, L]`, the roles of row `row`."""
        prompt = self.prompt_of(row)
        return self.known.roles[prompt : prompt + 1]


@dataclass(frozen=True)
class Row:
    """A recognised row: the branch, and its place among what was encoded for it."""

    branch: Branch
    index: int


Rows = tuple[Row | None, ...]
"""What each row of a UNet's batch is; None for one that was not encoded by the pipeline."""


def recognise(context: torch.Tensor, encoded: dict[Branch, Encodings]) -> Rows:
    """For each row of `context` `[U, L, D]` the row that was encoded, None for one that was not. One device sync.

    Where several are equal, as for several images of a prompt, each is used as often as the others.
    """
    candidates: list[Row] = []
    equal: list[torch.Tensor] = []
    for branch in UNCOND_FIRST:
        if branch not in encoded or encoded[branch].embeds.shape[1:] != context.shape[1:]:
            continue
        embeds = encoded[branch].embeds.to(context)
        candidates += [Row(branch, index) for index in range(embeds.shape[0])]
        # One row of what was encoded at a time: all pairs at once would need memory for each.
        equal += [(context == row).flatten(1).all(1) for row in embeds]
    if not candidates:
        return (None,) * context.shape[0]
    used: Counter[Row] = Counter()
    found: list[Row | None] = []
    for matches in torch.stack(equal, 1).cpu().tolist():
        same = [row for row, matching in zip(candidates, matches, strict=True) if matching]
        row = min(same, key=lambda row: used[row], default=None)
        if row is not None:
            used[row] += 1
        found.append(row)
    return tuple(found)
