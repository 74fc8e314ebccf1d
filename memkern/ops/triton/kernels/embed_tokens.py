"""`embed_tokens`: pad swap, gather and position add."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "length", "vocabulary", "pad_id"])
def embed_tokens_kernel(
    input_ids, roles, tokens, positions, out, count, length, vocabulary, width, pad_id, tokens_row, positions_row,
    PAD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """input_ids and roles `[B, L]`, tokens `[V, D]`, positions `[P, D]` → out `[B, L, D]`; `count` = B · L.

    An id out of range gives a row of NaN: raising would need a device sync.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = index < count
    in_row = (column < width)[None, :]
    role = tl.load(roles + index, mask=exists, other=0)
    token = tl.where(role == PAD, pad_id, tl.load(input_ids + index, mask=exists, other=0))
    valid = (token >= 0) & (token < vocabulary)
    mask = (exists & valid)[:, None] & in_row
    embedding = tl.load(tokens + (token * tokens_row)[:, None] + column[None, :], mask=mask, other=0.0)
    position = tl.load(positions + (index % length * positions_row)[:, None] + column[None, :], mask=mask, other=0.0)
    total = tl.where(valid[:, None], embedding.to(tl.float32) + position.to(tl.float32), float("nan"))
    at = index[:, None] * width + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=exists[:, None] & in_row)
