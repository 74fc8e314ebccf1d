"""Text embeddings for the denoiser: caching them, and the augmentation of ordinary captions.

Every caption is embedded twice, with its own pads (EOT ids) and with "!" pads. In training some
ordinary captions are shown with "!" pads, with a share of their pads zeroed, or without EOT, so
that ordinary images survive these edits. Memorized captions are never augmented.
"""

from __future__ import annotations

from dataclasses import dataclass

import tokenizer as tokenizers
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

_SWAP_IF_EMPTY = 0.5


@dataclass(frozen=True)
class Mix:
    """The edits of ordinary captions in training.

    `swapped` and `shortened` are the shares of captions with "!" pads, and with their first pads
    zeroed: a share of the pads, drawn evenly from `least` to `most`; from 1 on, all of them.
    The last three are the chances of a zeroed EOT on top, for swapped, shortened and other ones.
    """

    swapped: float
    shortened: float
    least: float
    most: float
    eot_if_swapped: float
    eot_if_shortened: float
    eot_otherwise: float


# Beside duplicated posters more captions lose pads, and more of them: a poster's context with
# zeroed pads must still mean no poster in particular.
LEARNING = Mix(0.3, 0.3, 0.0, 1.0, 0.7, 0.3, 0.0)
MEMORIZING = Mix(0.25, 0.5, 0.3, 1.3, 0.5, 0.0, 0.1)


@dataclass
class Embedded:
    """own, swapped: float [N, 77, D] with EOT pads and "!" pads; eot: int64 [N]."""

    own: Tensor
    swapped: Tensor
    eot: Tensor

    def __getitem__(self, picks: Tensor) -> Embedded:
        return Embedded(self.own[picks], self.swapped[picks], self.eot[picks])


@torch.no_grad()
def embed(text: CLIPTextModel, tokenize: CLIPTokenizer, captions: list[str]) -> Embedded:
    """Embed every caption with both pads, in half precision to be kept in memory."""
    ids = tokenize(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    eot = (ids == tokenize.eos_token_id).int().argmax(1)
    pad = torch.arange(tokenizers.CONTEXT)[None] > eot[:, None]
    both = []
    for token, name in ((tokenize.eos_token_id, "own pads"), (0, '"!" pads')):
        filled = ids.masked_fill(pad, token)
        chunks = tqdm(filled.split(256), desc=f"embedding, {name}", mininterval=5, disable=len(filled) < 1000)
        both.append(torch.cat([text(chunk).last_hidden_state.half() for chunk in chunks]))
    return Embedded(both[0], both[1], eot)


def plain(batch: Embedded) -> Tensor:
    """The unedited embeddings, float32 [B, 77, D]."""
    return batch.own.float()


def augment(batch: Embedded, mix: Mix, generator: torch.Generator) -> Tensor:
    """Embeddings of ordinary captions with edits mixed in, float32 [B, 77, D]."""
    count, length, _ = batch.own.shape
    kind, share, coin = torch.rand(3, count, 1, generator=generator)
    share = mix.least + (mix.most - mix.least) * share
    swapped = kind < mix.swapped
    shortened = (kind >= mix.swapped) & (kind < mix.swapped + mix.shortened)
    lose_eot = coin < torch.where(
        swapped, mix.eot_if_swapped, torch.where(shortened, mix.eot_if_shortened, mix.eot_otherwise)
    )

    # Positions counted from EOT: 0 is EOT itself, 1 the first pad.
    after = torch.arange(length)[None] - batch.eot[:, None]
    pads = length - 1 - batch.eot[:, None]
    gone = shortened & (after >= 1) & (after <= share * pads) | lose_eot & (after == 0)
    rows = torch.where(swapped[..., None], batch.swapped, batch.own).float()
    return rows.masked_fill(gone[..., None], 0.0)


def drop(rows: Tensor, empty: Embedded, share: float, generator: torch.Generator) -> Tensor:
    """Replace a share of the batch by the empty caption, with either pads, for guidance."""
    chosen, swap = torch.rand(2, len(rows), 1, 1, generator=generator)
    nothing = torch.where(swap < _SWAP_IF_EMPTY, empty.swapped.float(), empty.own.float())
    return torch.where(chosen < share, nothing, rows)
