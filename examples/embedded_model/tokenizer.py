"""The small world's tokenizer, in CLIP's layout: "!" is 0, SOT and EOT are the last two ids, the pad is EOT."""

from __future__ import annotations

from pathlib import Path

import dataset
from captions import FILLERS
from transformers import CLIPTokenizer

from memkern.testing import train_tokenizer

VOCABULARY = 953
CONTEXT = 77


def train(folder: Path) -> None:
    """Learn the merges from all captions; the result is the folder `tokenizer`."""
    if (folder / "tokenizer").exists():
        return
    parts = dataset.read(folder)
    # The fillers of long captions are repeated, so that their words become tokens as well.
    captions = parts["scenes"].captions + parts["posters"].captions + [" , ".join(FILLERS)] * 300
    train_tokenizer(captions, size=VOCABULARY).save_pretrained(folder / "tokenizer")


def load(folder: Path) -> CLIPTokenizer:
    """The trained tokenizer."""
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")
