"""`attention_mass`: BLOCK_M queries of a head; once over the keys for the softmax's sums, once for its columns."""

import triton
import triton.language as tl

from .tiles import EXCLUDED, biased_logits, exp_from, load_tiles, reciprocal


@triton.jit(do_not_specialize=["queries", "keys", "heads", "tiles"])
def attention_mass_kernel(
    q, k, bias, weight, by_tile, by_query, q_batch, q_head, q_row, k_batch, k_head, k_row,
    bias_batch, bias_head, bias_key, weight_batch, weight_key, queries, keys, heads, tiles, scale,
    D: tl.constexpr, D_PARTS: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q `[B, H, N, D]`, k `[B, H, n, D]`, bias `[B, H, n]`, weight `[B, n]` → `[B, H, tiles, n]`, `[B, H, N]`."""
    tile = tl.program_id(0).to(tl.int64)
    head = (tile // tiles) % heads
    batch = tile // tiles // heads
    row = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < queries
    q += batch * q_batch + head * q_head + row[:, None] * q_row
    k += batch * k_batch + head * k_head
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
            q_tiles, k, k_row, bias, bias_key, key, keys, scale, D, D_PARTS, EVEN, BLOCK_M, BLOCK_N
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
            q_tiles, k, k_row, bias, bias_key, key, keys, scale, D, D_PARTS, EVEN, BLOCK_M, BLOCK_N
        )
        p = exp_from(biased, highest) * inverse[:, None]
        w = tl.load(weight + key * weight_key, mask=key < keys, other=0.0)
        chosen += tl.sum(p * w[None, :], 1)
        tl.store(by_tile + key, tl.sum(p, 0), mask=key < keys)
    tl.store(by_query, chosen, mask=row_mask)
