"""`biased_attention`, with the softmax taken block by block of keys, and with all keys of a head held."""

import triton
import triton.language as tl

from .tiles import (
    EXCLUDED,
    biased_logits,
    count_keys,
    exp_from,
    load_keys,
    load_parts,
    load_tiles,
    part_logits,
    reciprocal,
    softmax_parts,
    span,
    sum_parts,
    tile_mask,
    zeros,
)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "tiles"])
def biased_attention_kernel(
    q, k, v, bias, out, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    bias_batch, bias_head, bias_key, queries, keys, heads, tiles, scale,
    D: tl.constexpr, D_PARTS: tl.constexpr, EVEN: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q `[B, H, N, D]`, k and v `[B, H, n, D]`, bias `[B, H, n]` → out `[B, N, H, D]`.

    Strides of q, k and v count UNIT elements, so that the compiler knows their alignment.
    """
    program = tl.program_id(0)
    head = ((program // tiles) % heads).to(tl.int64)
    batch = (program // (tiles * heads)).to(tl.int64)
    row = (program % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < queries
    q += (batch * q_batch + head * q_head + row[:, None] * q_row) * UNIT
    k += (batch * k_batch + head * k_head) * UNIT
    v += (batch * v_batch + head * v_head) * UNIT
    out += ((batch * queries + row[:, None]) * heads + head) * D
    bias += batch * bias_batch + head * bias_head
    q_tiles = load_tiles(q, row_mask, D, D_PARTS, EVEN)
    sums = ()
    for j in tl.static_range(len(D_PARTS)):
        sums = sums + (zeros(BLOCK_M, D_PARTS[j]),)
    highest = tl.full([BLOCK_M], EXCLUDED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, count_keys(bias, bias_key, 0, 1, keys, KEYS), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        biased, live = biased_logits(
            q_tiles, k, k_row * UNIT, bias, bias_key, key, keys, scale, D, D_PARTS, EVEN, BLOCK_M, BLOCK_N
        )
        risen = tl.maximum(highest, tl.max(biased, 1))
        p = exp_from(biased, risen)
        fade = tl.where(risen == EXCLUDED, 0.0, tl.exp(highest - risen))
        total = total * fade + tl.sum(p, 1)
        highest = risen
        more = ()
        column = 0
        for j in tl.static_range(len(D_PARTS)):
            d = span(column, D_PARTS[j])
            v_at = key[:, None].to(tl.int64) * (v_row * UNIT) + d[None, :]
            v_tile = tl.load(v + v_at, mask=tile_mask(live, d, D, EVEN), other=0.0)
            more = more + (tl.dot(p.to(v_tile.dtype), v_tile, sums[j] * fade[:, None], input_precision="ieee"),)
            column += D_PARTS[j]
        sums = more
    inverse = reciprocal(total)
    column = 0
    for j in tl.static_range(len(D_PARTS)):
        d = span(column, D_PARTS[j])
        value = (sums[j] * inverse[:, None]).to(out.dtype.element_ty)
        tl.store(out + d[None, :], value, mask=tile_mask(row_mask, d, D, EVEN))
        column += D_PARTS[j]


@triton.jit(do_not_specialize=["queries", "keys", "heads", "groups", "tiles"])
def resident_attention_kernel(
    q, k, v, bias, out, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    bias_batch, bias_head, bias_key, queries, keys, heads, groups, tiles, scale,
    D: tl.constexpr, D_PARTS: tl.constexpr, EVEN: tl.constexpr, KEY_PARTS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The same with all of a head's k and v held: `tiles` tiles of queries a program, loaded one ahead."""
    program = tl.program_id(0)
    head = ((program // groups) % heads).to(tl.int64)
    batch = (program // (groups * heads)).to(tl.int64)
    q += (batch * q_batch + head * q_head) * UNIT
    k += (batch * k_batch + head * k_head) * UNIT
    v += (batch * v_batch + head * v_head) * UNIT
    out += (batch * queries * heads + head) * D
    bias += batch * bias_batch + head * bias_head
    k_tiles = load_keys(k, k_row * UNIT, keys, KEY_PARTS, D, D_PARTS, EVEN)
    v_tiles = load_keys(v, v_row * UNIT, keys, KEY_PARTS, D, D_PARTS, EVEN)
    biases = load_parts(bias, bias_key, keys, EXCLUDED, KEY_PARTS)
    kept = ()
    for i in tl.static_range(len(KEY_PARTS)):
        for j in tl.static_range(len(D_PARTS)):
            v_tile = v_tiles[i * len(D_PARTS) + j]
            kept = kept + (tl.where((biases[i] != EXCLUDED)[:, None], v_tile, 0.0).to(v_tile.dtype),)
    start = (program % groups) * tiles * BLOCK_M
    for first_row in range(start, tl.minimum(start + tiles * BLOCK_M, queries), BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        row_mask = row < queries
        q_tiles = load_tiles(q + row[:, None].to(tl.int64) * (q_row * UNIT), row_mask, D, D_PARTS, EVEN)
        logits = part_logits(q_tiles, k_tiles, D_PARTS, KEY_PARTS, BLOCK_M)
        terms = softmax_parts(logits, biases, scale, KEY_PARTS, BLOCK_M)
        inverse = reciprocal(sum_parts(terms, KEY_PARTS, BLOCK_M))
        column = 0
        for j in tl.static_range(len(D_PARTS)):
            total = zeros(BLOCK_M, D_PARTS[j])
            for i in tl.static_range(len(KEY_PARTS)):
                v_tile = kept[i * len(D_PARTS) + j]
                total = tl.dot(terms[i].to(v_tile.dtype), v_tile, total, input_precision="ieee")
            d = span(column, D_PARTS[j])
            value = (total * inverse[:, None]).to(out.dtype.element_ty)
            out_at = row[:, None].to(tl.int64) * (heads * D) + d[None, :]
            tl.store(out + out_at, value, mask=tile_mask(row_mask, d, D, EVEN))
            column += D_PARTS[j]
