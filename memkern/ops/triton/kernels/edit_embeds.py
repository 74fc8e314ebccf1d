"""`edit_embeds`."""

import triton
import triton.language as tl

from .rows import edit_tile


@triton.jit(do_not_specialize=["count", "length", "bank_length"])
def edit_embeds_kernel(
    embeds, bank, source, scale, out, count, length, bank_length, width,
    embeds_batch, embeds_row, bank_batch, bank_row, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """embeds `[B, L, D]`, bank `[B, M, D]`, source and scale `[B, L]` → out `[B, L, D]`; `count` = B · L."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    edit_tile(
        embeds, bank, source, scale, out, index, index < count, column, length, bank_length, width,
        embeds_batch, embeds_row, bank_batch, bank_row,
    )  # fmt: skip
