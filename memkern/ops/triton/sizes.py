"""Sizes of blocks."""

from __future__ import annotations

STEP = 8
"""The multiple to which the keys of `absorbed_attention` are padded: the narrowest product of tensor cores."""


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)


def up(size: int, multiple: int = 16) -> int:
    """`size` rounded up to a multiple."""
    return multiple * cdiv(size, multiple)


def power_of_2(size: int) -> int:
    """The least power of 2 that is not below `size`, and at least 1."""
    return 1 << max(0, size - 1).bit_length()


def split_width(size: int, largest: int = 256, multiple: int = 16) -> tuple[int, ...]:
    """Powers of 2, `largest` at most, that cover `size` up to the next multiple of 16, or of another power of 2.

    Triton's blocks are powers of 2, but widths are not: 40 → (32, 16), 77 → (64, 16), 320 → (256, 64).
    """
    left, parts = up(max(size, 1), multiple), []
    while left:
        parts.append(min(largest, 1 << (left.bit_length() - 1)))
        left -= parts[-1]
    return tuple(parts)
