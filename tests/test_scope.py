"""Scope: which layers the names in an edit's `layers` are."""

from __future__ import annotations

import pytest

from memkern import Edit
from memkern.actions import zero
from memkern.scope import in_layers

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize("prefix", ["", "controlnet:", "controlnet:1:"])
@pytest.mark.parametrize("last", ["attn1", "attn2"])
def test_the_last_part_of_a_name_may_be_left_out(prefix, last):
    name = f"{prefix}{BLOCK}.{last}"
    for layer in (name, f"{prefix}{BLOCK}", f"{BLOCK}.{last}", BLOCK, "down"):
        assert in_layers(Edit("pad", zero(), layers=layer), name, None), layer
    other = {"attn1": "attn2", "attn2": "attn1"}[last]
    for layer in (f"{BLOCK}.{other}", f"{BLOCK}.attn3", BLOCK[:-1], "mid", "8x8"):
        assert not in_layers(Edit("pad", zero(), layers=layer), name, None), layer
