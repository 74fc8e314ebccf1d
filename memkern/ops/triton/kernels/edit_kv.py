"""`edit_kv`: K and V in one launch."""

import triton
import triton.language as tl

from .rows import edit_tile


@triton.jit(do_not_specialize=["count", "length", "bank_length"])
def edit_kv_kernel(
    k, v, k_bank, v_bank, source, k_scale, v_scale, k_out, v_out, count, length, bank_length, width,
    k_batch, k_row, v_batch, v_row, k_bank_batch, k_bank_row, v_bank_batch, v_bank_row,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """k and v `[B, L, C]`, banks `[B, M, C]`, source and scales `[B, L]` → K and V `[B, L, C]`; `count` = B · L."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    edit_tile(
        k, k_bank, source, k_scale, k_out, index, index < count, column, length, bank_length, width,
        k_batch, k_row, k_bank_batch, k_bank_row,
    )  # fmt: skip
    edit_tile(
        v, v_bank, source, v_scale, v_out, index, index < count, column, length, bank_length, width,
        v_batch, v_row, v_bank_batch, v_bank_row,
    )  # fmt: skip
