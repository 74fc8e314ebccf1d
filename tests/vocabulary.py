"""CLIP's published vocabulary, read from the file that the package open-clip-torch ships (nothing is imported)."""

from __future__ import annotations

import gzip
from importlib.metadata import distribution

from memkern.testing import byte_letters

FILE = "open_clip/bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2  # a vocabulary of 49408: 2 × 256 bytes, the merges, SOT and EOT


def clip_vocabulary() -> tuple[list[str], list[str]]:
    """CLIP's tokens without SOT and EOT, in the order of their ids, and its merges."""
    path = distribution("open-clip-torch").locate_file(FILE)
    with gzip.open(str(path), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : MERGES + 1]
    letters = byte_letters()
    words = ["".join(merge.split()) for merge in merges]
    return [*letters, *(letter + "</w>" for letter in letters), *words], merges
