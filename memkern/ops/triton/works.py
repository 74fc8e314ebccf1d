"""The work of each launch, from sizes alone: products, and bytes through the L2 cache and device memory.

The sequences of a batch have `keys` keys each on average; `size` is bytes per element.
"""

from __future__ import annotations

from collections.abc import Iterator

from .cost import Work
from .sizes import STEP, cdiv, up


def probabilities(
    batch: int, queries: int, width: int, heads: int, keys: int, size: int, block_m: int, block_c: int, several: int
) -> Work:
    """The first kernel of `absorbed_attention`, for `several` heads a program: x and a in, probabilities out."""
    rows, padded = cdiv(queries, block_m), up(keys, STEP)
    return Work(
        programs=batch * heads // several * rows,
        products=block_m * several * padded * up(width, block_c),
        through_l2=size * ((block_m + several * padded) * width + block_m * several * padded),
        through_memory=size * batch * heads * keys * width,
        between=size * batch * queries * (width + heads * padded),
        turns=cdiv(width, block_c),
    )


def values(
    batch: int, queries: int, width: int, heads: int, keys: int, size: int, block_m: int, block_k: int, block_c: int
) -> Work:
    """The second kernel: probabilities and vo in, the layer's output out."""
    depth = heads * up(keys, STEP)
    return Work(
        programs=batch * cdiv(queries, block_m) * cdiv(width, block_c),
        products=block_m * block_c * up(depth, block_k),
        through_l2=size * ((block_m + block_c) * depth + block_m * block_c),
        through_memory=size * batch * heads * keys * width,
        between=size * batch * queries * (width + depth),
        turns=cdiv(depth, block_k),
    )


def resident(
    batch: int, queries: int, heads: int, head_dim: int, keys: int, size: int, block_m: int, tiles: int, products: int
) -> Work:
    """`biased_attention` (two products) or `attention_mass` (one) with all keys held, `tiles` tiles a program."""
    rows = block_m * tiles
    return Work(
        programs=batch * heads * cdiv(queries, rows),
        products=products * rows * up(keys) * up(head_dim),
        through_l2=products * size * (keys + rows) * head_dim,
        through_memory=products * size * batch * heads * keys * head_dim,
        between=products * size * batch * heads * queries * head_dim,
        turns=tiles,
    )


def linear(rows: int, inputs: int, outputs: int, size: int) -> Iterator[Work]:
    """A projection as a library computes it: by tiles of several sizes, its inner dimension split or whole."""
    for block_m, block_n in ((256, 128), (128, 128), (128, 64), (64, 64)):
        for split in (1, 2, 4):
            depth = cdiv(inputs, split)
            partial = 0 if split == 1 else 2 * 4 * block_m * block_n
            yield Work(
                programs=split * cdiv(rows, block_m) * cdiv(outputs, block_n),
                products=block_m * block_n * depth,
                through_l2=size * ((block_m + block_n) * depth + block_m * block_n) + partial,
                through_memory=size * inputs * outputs,
                between=size * rows * (inputs + outputs),
                turns=cdiv(depth, 32),
            )


def flash(batch: int, queries: int, heads: int, head_dim: int, keys: int, size: int) -> Iterator[Work]:
    """torch's attention: blocks of 64 keys or more, head dims up to the next multiple of 32."""
    for block_m in (128, 64):
        yield Work(
            programs=batch * heads * cdiv(queries, block_m),
            products=2 * block_m * up(keys, 64) * up(head_dim, 32),
            through_l2=2 * size * (keys + block_m) * head_dim,
            through_memory=0,
            between=2 * size * batch * heads * (queries + keys) * head_dim,
            turns=cdiv(keys, 64),
        )


def elementwise(values: int, tensors: int, size: int) -> Work:
    """A pass over `tensors` tensors of `values` values each."""
    moved = size * values * tensors
    return Work(cdiv(values, 4096), 0, moved / cdiv(values, 4096), 0, moved)
