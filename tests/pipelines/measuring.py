"""A layer whose paths a chooser chooses from."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from memkern import timings
from memkern.testing import SiteHolder


def attention(processor=None, width=32):
    torch.manual_seed(0)
    made = Attention(width, 24, heads=4, dim_head=width // 4, processor=processor or AttnProcessor2_0()).eval()
    return made.requires_grad_(False)


@torch.no_grad()
def choice(chooser, queries=16, attn=None):
    """The choice of a layer with `chooser`."""
    attn = attn or attention()
    holder = SiteHolder(torch.nn.ModuleDict({"attn2": attn}))
    holder.chooser = chooser
    x, context = torch.ones(2, queries, 32), torch.ones(2, 77, 24)
    context[:, 1::2] = 2
    for _ in range(2):
        attn(x, encoder_hidden_states=context)
    return holder.session.layers["attn2"]


def files(folder):
    return sorted(folder.glob("*.json"))


def forget():
    """Make the next look at a table read its file, as a new process does."""
    timings.table.cache_clear(), timings._table.cache_clear()
