"""CLIP's published vocabulary, read from the file that the package open-clip-torch ships (nothing is imported)."""

from __future__ import annotations

import gzip
from importlib.metadata import distribution

FILE = "open_clip/bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2  # a vocabulary of 49408: 2 × 256 bytes, the merges, SOT and EOT


def byte_letters() -> list[str]:
    """The letter that stands for each byte, in CLIP's order: printable ones first, so that "!" is 0."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def clip_vocabulary() -> tuple[list[str], list[str]]:
    """CLIP's tokens without SOT and EOT, in the order of their ids, and its merges."""
    path = distribution("open-clip-torch").locate_file(FILE)
    with gzip.open(str(path), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : MERGES + 1]
    letters = byte_letters()
    words = ["".join(merge.split()) for merge in merges]
    return [*letters, *(letter + "</w>" for letter in letters), *words], merges
