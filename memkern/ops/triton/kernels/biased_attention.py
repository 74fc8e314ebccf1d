"""`biased_attention`: one program per BLOCK_M queries of a head, softmax over blocks of keys as they come."""

import triton
import triton.language as tl

from .tiles import EXCLUDED, biased_logits, count_keys, exp_from, load_tiles, reciprocal, span, tile_mask, zeros


@triton.jit(do_not_specialize=["queries", "keys", "heads", "tiles"])
def biased_attention_kernel(
    q, k, v, bias, out, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    bias_batch, bias_head, bias_key, queries, keys, heads, tiles, scale,
    D: tl.constexpr, D_PARTS: tl.constexpr, EVEN: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q `[B, H, N, D]`, k and v `[B, H, n, D]`, bias `[B, H, n]` → out `[B, N, H, D]`."""
    program = tl.program_id(0)
    head = ((program // tiles) % heads).to(tl.int64)
    batch = (program // (tiles * heads)).to(tl.int64)
    row = (program % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < queries
    q += batch * q_batch + head * q_head + row[:, None] * q_row
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
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
            q_tiles, k, k_row, bias, bias_key, key, keys, scale, D, D_PARTS, EVEN, BLOCK_M, BLOCK_N
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
            v_at = key[:, None].to(tl.int64) * v_row + d[None, :]
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
