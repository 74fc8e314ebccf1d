"""`attention_mass`: one pass over blocks of keys for the softmax's sums, one for its columns; or with all keys held."""

import triton
import triton.language as tl

from .tiles import (
    EXCLUDED,
    biased_logits,
    exp_from,
    load_keys,
    load_parts,
    load_tiles,
    part_logits,
    reciprocal,
    softmax_parts,
    span,
    sum_parts,
)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "tiles"])
def attention_mass_kernel(
    q, k, bias, weight, by_tile, by_query, q_batch, q_head, q_row, k_batch, k_head, k_row,
    bias_batch, bias_head, bias_key, weight_batch, weight_key, queries, keys, heads, tiles, scale,
    D: tl.constexpr, D_PARTS: tl.constexpr, EVEN: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q `[B, H, N, D]`, k `[B, H, n, D]`, bias `[B, H, n]`, weight `[B, n]` → `[B, H, tiles, n]`, `[B, H, N]`.

    Strides of q and k count UNIT elements.
    """
    tile = tl.program_id(0).to(tl.int64)
    head = (tile // tiles) % heads
    batch = tile // tiles // heads
    row = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < queries
    q += (batch * q_batch + head * q_head + row[:, None] * q_row) * UNIT
    k += (batch * k_batch + head * k_head) * UNIT
    bias += batch * bias_batch + head * bias_head
    weight += batch * weight_batch
    by_tile += tile * keys
    by_query += (batch * heads + head) * queries + row
    q_tiles = load_tiles(q, row_mask, D, D_PARTS, EVEN)
    highest = tl.full([BLOCK_M], EXCLUDED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        biased, _ = biased_logits(
            q_tiles, k, k_row * UNIT, bias, bias_key, key, keys, scale, D, D_PARTS, EVEN, BLOCK_M, BLOCK_N
        )
        risen = tl.maximum(highest, tl.max(biased, 1))
        fade = tl.where(risen == EXCLUDED, 0.0, tl.exp(highest - risen))
        total = total * fade + tl.sum(exp_from(biased, risen), 1)
        highest = risen
    inverse = tl.where(row_mask, reciprocal(total), 0.0)
    chosen = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        biased, _ = biased_logits(
            q_tiles, k, k_row * UNIT, bias, bias_key, key, keys, scale, D, D_PARTS, EVEN, BLOCK_M, BLOCK_N
        )
        p = exp_from(biased, highest) * inverse[:, None]
        w = tl.load(weight + key * weight_key, mask=key < keys, other=0.0)
        chosen += tl.sum(p * w[None, :], 1)
        tl.store(by_tile + key, tl.sum(p, 0), mask=key < keys)
    tl.store(by_query, chosen, mask=row_mask)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "groups", "tiles"])
def resident_mass_kernel(
    q, k, bias, weight, by_group, by_query, q_batch, q_head, q_row, k_batch, k_head, k_row,
    bias_batch, bias_head, bias_key, weight_batch, weight_key, queries, keys, heads, groups, tiles, scale,
    D: tl.constexpr, D_PARTS: tl.constexpr, EVEN: tl.constexpr, KEY_PARTS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The same with all of a head's k held, `tiles` tiles of queries a program, `groups` of them a head."""
    program = tl.program_id(0).to(tl.int64)
    head = (program // groups) % heads
    batch = program // groups // heads
    q += (batch * q_batch + head * q_head) * UNIT
    k += (batch * k_batch + head * k_head) * UNIT
    bias += batch * bias_batch + head * bias_head
    by_query += (batch * heads + head) * queries
    k_tiles = load_keys(k, k_row * UNIT, keys, KEY_PARTS, D, D_PARTS, EVEN)
    biases = load_parts(bias, bias_key, keys, EXCLUDED, KEY_PARTS)
    weights = load_parts(weight + batch * weight_batch, weight_key, keys, 0.0, KEY_PARTS)
    sums = ()
    for i in tl.static_range(len(KEY_PARTS)):
        sums = sums + (tl.zeros_like(biases[i]),)
    start = (tl.program_id(0) % groups) * tiles * BLOCK_M
    for first_row in range(start, tl.minimum(start + tiles * BLOCK_M, queries), BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        row_mask = row < queries
        q_tiles = load_tiles(q + row[:, None].to(tl.int64) * (q_row * UNIT), row_mask, D, D_PARTS, EVEN)
        logits = part_logits(q_tiles, k_tiles, D_PARTS, KEY_PARTS, BLOCK_M)
        terms = softmax_parts(logits, biases, scale, KEY_PARTS, BLOCK_M)
        inverse = tl.where(row_mask, reciprocal(sum_parts(terms, KEY_PARTS, BLOCK_M)), 0.0)
        chosen = tl.zeros([BLOCK_M], tl.float32)
        more = ()
        for i in tl.static_range(len(KEY_PARTS)):
            p = terms[i] * inverse[:, None]
            chosen += tl.sum(p * weights[i][None, :], 1)
            more = more + (sums[i] + tl.sum(p, 0),)
        sums = more
        tl.store(by_query + row, chosen, mask=row_mask)
    first = 0
    for i in tl.static_range(len(KEY_PARTS)):
        key = span(first, KEY_PARTS[i])
        tl.store(by_group + program * keys + key, sums[i], mask=key < keys)
        first += KEY_PARTS[i]
