"""A plan on rows, in Triton: the tile that `edit_embeds` and `edit_kv` share.

out[b, l] = scale[b, l] · rows[b, source[b, l]]        rows: the sequence's own, then the bank's
"""

import triton
import triton.language as tl


@triton.jit
def edit_tile(
    rows, bank, source, scale, out, index, mask, column, length, bank_length, width,
    rows_batch, rows_row, bank_batch, bank_row,
):  # fmt: skip
    """The keys `index` `[R]` (int64, counted through the batch) by `column` `[C]`, of a contiguous `out`.

    A source out of range gives a row of NaN: raising would need a device sync.
    """
    read = tl.load(source + index, mask=mask, other=0).to(tl.int64)
    factor = tl.load(scale + index, mask=mask, other=0.0)
    batch = index // length
    own = read < length
    valid = (read >= 0) & (read < length + bank_length)
    in_row = (column < width)[None, :]
    # A scale of 0 selects 0: its row is not read.
    wanted = mask & valid & (factor != 0.0)
    at = (batch * rows_batch + read * rows_row)[:, None] + column[None, :]
    value = tl.load(rows + at, mask=(wanted & own)[:, None] & in_row, other=0.0)
    if bank is not None:
        at = (batch * bank_batch + (read - length) * bank_row)[:, None] + column[None, :]
        extra = tl.load(bank + at, mask=(wanted & ~own)[:, None] & in_row, other=0.0)
        value = tl.where(own[:, None], value, extra)
    scaled = (value.to(tl.float32) * factor[:, None]).to(value.dtype)
    result = tl.where((factor == 1.0)[:, None], value, scaled)
    result = tl.where((factor == 0.0)[:, None], 0.0, result)
    result = tl.where(valid[:, None], result, float("nan"))
    tl.store(
        out + index[:, None] * width + column[None, :], result.to(out.dtype.element_ty), mask=mask[:, None] & in_row
    )
