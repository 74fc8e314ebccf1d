"""Parts that kernels share: tiles of any width, keys that are not excluded, a softmax without NaN."""

import triton
import triton.language as tl

EXCLUDED = tl.constexpr(float("-inf"))


@triton.jit
def span(first, SIZE: tl.constexpr):
    """SIZE indices from `first`. (Triton 3.6 takes an element of a tuple as a size only through a call.)"""
    return first + tl.arange(0, SIZE)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A float32 tile to sum in."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def tile_mask(rows, columns, width, EVEN: tl.constexpr):
    """Rows `[R]` that exist by columns `[C]` below `width`; EVEN promises that all columns are."""
    if EVEN:
        return rows[:, None]
    else:
        return rows[:, None] & (columns < width)[None, :]


@triton.jit
def load_tiles(rows, row_mask, D: tl.constexpr, D_PARTS: tl.constexpr, EVEN: tl.constexpr):
    """The rows `[M, 1]` of pointers as a tuple of tiles `[M, part]` of their D columns."""
    tiles = ()
    column = 0
    for j in tl.static_range(len(D_PARTS)):
        d = span(column, D_PARTS[j])
        tiles = tiles + (tl.load(rows + d[None, :], mask=tile_mask(row_mask, d, D, EVEN), other=0.0),)
        column += D_PARTS[j]
    return tiles


@triton.jit
def load_keys(
    rows, stride, keys, KEY_PARTS: tl.constexpr, D: tl.constexpr, D_PARTS: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """A head's whole k or v `[n, D]`: for each part of the keys a tile `[part, part of D]` per part of D, in a row.

    Excluded keys are loaded too: to check them, the load would wait for the bias.
    """
    tiles = ()
    first = 0
    for i in tl.static_range(len(KEY_PARTS)):
        key = span(first, KEY_PARTS[i])
        tiles = tiles + load_tiles(rows + key[:, None].to(tl.int64) * stride, key < keys, D, D_PARTS, EVEN)
        first += KEY_PARTS[i]
    return tiles


@triton.jit
def load_parts(values, stride, keys, other, KEY_PARTS: tl.constexpr):
    """A number per key as a tuple of `[part]`; `other` where there is no key."""
    parts = ()
    first = 0
    for i in tl.static_range(len(KEY_PARTS)):
        key = span(first, KEY_PARTS[i])
        parts = parts + (tl.load(values + key * stride, mask=key < keys, other=other),)
        first += KEY_PARTS[i]
    return parts


@triton.jit
def part_logits(q_tiles, k_tiles, D_PARTS: tl.constexpr, KEY_PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """q kᵀ of tiles that `load_tiles` and `load_keys` made, `[M, part]` per part of the keys."""
    logits = ()
    for i in tl.static_range(len(KEY_PARTS)):
        total = zeros(BLOCK_M, KEY_PARTS[i])
        for j in tl.static_range(len(D_PARTS)):
            k_tile = k_tiles[i * len(D_PARTS) + j]
            total = tl.dot(q_tiles[j], tl.trans(k_tile), total, input_precision="ieee")
        logits = logits + (total,)
    return logits


@triton.jit
def softmax_parts(logits, biases, scale, KEY_PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """exp(logits · scale + bias), from each row's highest, as `[M, part]` per part of the keys: a softmax's terms.

    An excluded key's term is 0 for any logit.
    """
    highest = tl.full([BLOCK_M], EXCLUDED, tl.float32)
    biased = ()
    for i in tl.static_range(len(KEY_PARTS)):
        b = biases[i]
        biased = biased + (tl.where((b != EXCLUDED)[None, :], logits[i] * scale + b[None, :], EXCLUDED),)
        highest = tl.maximum(highest, tl.max(biased[i], 1))
    terms = ()
    for i in tl.static_range(len(KEY_PARTS)):
        terms = terms + (exp_from(biased[i], highest),)
    return terms


@triton.jit
def sum_parts(terms, KEY_PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The sum of each row over all parts, `[M]`."""
    total = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(len(KEY_PARTS)):
        total += tl.sum(terms[i], 1)
    return total


@triton.jit
def biased_logits(
    q_tiles, k, k_row, bias, bias_key, key, keys, scale,
    D: tl.constexpr, D_PARTS: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q kᵀ · scale + bias `[M, N]` of the keys `key` `[N]`, and a mask of those that are not excluded.

    An excluded key stays excluded where the query holds a NaN or Inf; its k is not read.
    """
    b = tl.load(bias + key * bias_key, mask=key < keys, other=EXCLUDED)
    live = b != EXCLUDED
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    column = 0
    for j in tl.static_range(len(D_PARTS)):
        d = span(column, D_PARTS[j])
        k_at = key[:, None].to(tl.int64) * k_row + d[None, :]
        k_tile = tl.load(k + k_at, mask=tile_mask(live, d, D, EVEN), other=0.0)
        logits = tl.dot(q_tiles[j], tl.trans(k_tile), logits, input_precision="ieee")
        column += D_PARTS[j]
    return tl.where(live[None, :], logits * scale + b[None, :], EXCLUDED), live


@triton.jit
def count_keys(bias, bias_key, bias_head, heads, keys, KEYS: tl.constexpr):
    """The index after the last key that some head does not exclude: a sequence skips the keys from there on.

    Args:
        bias: pointer to the biases of a sequence, `keys` of them per head.
        heads: how many heads have their own biases; 1 where all heads share them.
        KEYS: a power of 2, at least `keys`.
    """
    index = tl.arange(0, KEYS)
    last = tl.zeros([KEYS], tl.int32)
    for head in range(heads):
        values = tl.load(bias + head * bias_head + index * bias_key, mask=index < keys, other=EXCLUDED)
        last = tl.maximum(last, tl.where(values != EXCLUDED, index + 1, 0))
    return tl.max(last, 0)


@triton.jit
def exp_from(logits, highest):
    """exp(logits - highest) for `[M, n]` and `[M]`; 0, not NaN, in a row that has no finite logit."""
    shift = tl.where(highest == EXCLUDED, 0.0, highest)
    return tl.exp(logits - shift[:, None])


@triton.jit
def reciprocal(total):
    """1 / total for the sums of a softmax; 1 for a row without keys, whose weights are 0."""
    return 1.0 / tl.where(total == 0.0, 1.0, total)
