"""The kernels of `absorbed_attention`: x `[B, N, C]`, a and vo `[B, H, n, C]`, bias `[B, H, n]` → `[B, N, C]`.

Blocks are powers of 2 and widths are not: C and the keys are each covered by a tuple of parts, 320 = 256 + 64.
All offsets within a tile are constants of the compiled kernel (x, a and vo are contiguous), which is what
leaves the registers to the output tile.
"""

import triton
import triton.language as tl

from .tiles import EXCLUDED, count_keys, exp_from, reciprocal, span, tile_mask, zeros


@triton.jit
def head_probabilities(
    x, a, bias, bias_key, row_mask, keys,
    C: tl.constexpr, KEY_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """softmax(x · aᵀ + bias) over one head's keys: a `[BLOCK_M, part]` tile per part of the keys."""
    row = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_C)
    logits = ()
    for i in tl.static_range(len(KEY_PARTS)):
        logits = logits + (zeros(BLOCK_M, KEY_PARTS[i]),)
    for start in range(0, C, BLOCK_C):
        c = start + channel
        x_tile = tl.load(x + row[:, None] * C + c[None, :], mask=tile_mask(row_mask, c, C, EVEN), other=0.0)
        sums = ()
        first = 0
        for i in tl.static_range(len(KEY_PARTS)):
            key = span(first, KEY_PARTS[i])
            live = tl.load(bias + key * bias_key, mask=key < keys, other=EXCLUDED) != EXCLUDED
            a_tile = tl.load(a + key[:, None] * C + c[None, :], mask=tile_mask(live, c, C, EVEN), other=0.0)
            sums = sums + (tl.dot(x_tile, tl.trans(a_tile), logits[i], input_precision="ieee"),)
            first += KEY_PARTS[i]
        logits = sums
    highest = tl.full([BLOCK_M], EXCLUDED, tl.float32)
    biased = ()
    first = 0
    for i in tl.static_range(len(KEY_PARTS)):
        key = span(first, KEY_PARTS[i])
        b = tl.load(bias + key * bias_key, mask=key < keys, other=EXCLUDED)
        biased = biased + (tl.where((b != EXCLUDED)[None, :], logits[i] + b[None, :], EXCLUDED),)
        highest = tl.maximum(highest, tl.max(biased[i], 1))
        first += KEY_PARTS[i]
    total = tl.zeros([BLOCK_M], tl.float32)
    weights = ()
    for i in tl.static_range(len(KEY_PARTS)):
        weights = weights + (exp_from(biased[i], highest),)
        total += tl.sum(weights[i], 1)
    inverse = reciprocal(total)
    probabilities = ()
    for i in tl.static_range(len(KEY_PARTS)):
        probabilities = probabilities + (weights[i] * inverse[:, None],)
    return probabilities


@triton.jit
def attend(
    x, a, bias, vo, out_bias, residual, out, bias_head, bias_key, row_mask, heads, keys,
    C: tl.constexpr, C_PARTS: tl.constexpr, KEY_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    EVEN_X: tl.constexpr, EVEN_OUT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of the output; the pointers are at the first of the rows, and at the first head."""
    row = tl.arange(0, BLOCK_M)
    sums = ()
    for j in tl.static_range(len(C_PARTS)):
        sums = sums + (zeros(BLOCK_M, C_PARTS[j]),)
    for _ in range(heads):
        p = head_probabilities(
            x, a, bias, bias_key, row_mask, keys, C, KEY_PARTS, BLOCK_M, BLOCK_C, EVEN_X
        )  # fmt: skip
        more = ()
        column = 0
        for j in tl.static_range(len(C_PARTS)):
            c = span(column, C_PARTS[j])
            total = sums[j]
            first = 0
            for i in tl.static_range(len(KEY_PARTS)):
                key = span(first, KEY_PARTS[i])
                live = tl.load(bias + key * bias_key, mask=key < keys, other=EXCLUDED) != EXCLUDED
                vo_tile = tl.load(vo + key[:, None] * C + c[None, :], mask=tile_mask(live, c, C, EVEN_OUT), other=0.0)
                total = tl.dot(p[i].to(vo_tile.dtype), vo_tile, total, input_precision="ieee")
                first += KEY_PARTS[i]
            more = more + (total,)
            column += C_PARTS[j]
        sums = more
        a += keys * C
        vo += keys * C
        bias += bias_head
    column = 0
    for j in tl.static_range(len(C_PARTS)):
        c = span(column, C_PARTS[j])
        finish(sums[j], out_bias, residual, out, row, c, row_mask, C, EVEN_OUT)
        column += C_PARTS[j]


@triton.jit
def finish(total, out_bias, residual, out, row, c, row_mask, C: tl.constexpr, EVEN: tl.constexpr):
    """Add what comes after the heads to a tile, and write it."""
    mask = tile_mask(row_mask, c, C, EVEN)
    at = row[:, None] * C + c[None, :]
    if out_bias is not None:
        total += tl.load(out_bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["bias_heads", "queries", "keys", "heads", "tiles"])
def absorbed_attention_kernel(
    x, a, bias, vo, out_bias, residual, out, bias_batch, bias_head, bias_key, bias_heads, queries, keys, heads, tiles,
    C: tl.constexpr, C_PARTS: tl.constexpr, KEYS: tl.constexpr, FEW: tl.constexpr, FEW_PARTS: tl.constexpr,
    KEY_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    EVEN_X: tl.constexpr, EVEN_OUT: tl.constexpr,
):  # fmt: skip
    """The whole layer for BLOCK_M rows. A sequence with at most FEW keys takes the narrower of two bodies."""
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    first_row = (tl.program_id(0) % tiles) * BLOCK_M
    row_mask = first_row + tl.arange(0, BLOCK_M) < queries
    at = (batch * queries + first_row) * C
    x += at
    out += at
    if residual is not None:
        residual += at
    a += batch * heads * keys * C
    vo += batch * heads * keys * C
    bias += batch * bias_batch
    if count_keys(bias, bias_key, bias_head, bias_heads, keys, KEYS) <= FEW:
        attend(
            x, a, bias, vo, out_bias, residual, out, bias_head, bias_key, row_mask, heads, keys,
            C, C_PARTS, FEW_PARTS, BLOCK_M, BLOCK_C, EVEN_X, EVEN_OUT,
        )  # fmt: skip
    else:
        attend(
            x, a, bias, vo, out_bias, residual, out, bias_head, bias_key, row_mask, heads, keys,
            C, C_PARTS, KEY_PARTS, BLOCK_M, BLOCK_C, EVEN_X, EVEN_OUT,
        )  # fmt: skip


@triton.jit
def write_probabilities(
    x, a, bias, out, out_row, bias_key, row_mask, keys,
    C: tl.constexpr, KEY_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One head's probabilities of BLOCK_M rows into memory."""
    p = head_probabilities(x, a, bias, bias_key, row_mask, keys, C, KEY_PARTS, BLOCK_M, BLOCK_C, EVEN)
    row = tl.arange(0, BLOCK_M)
    first = 0
    for i in tl.static_range(len(KEY_PARTS)):
        key = span(first, KEY_PARTS[i])
        tl.store(out + row[:, None] * out_row + key[None, :], p[i].to(out.dtype.element_ty), mask=row_mask[:, None])
        first += KEY_PARTS[i]


@triton.jit(do_not_specialize=["queries", "keys", "heads", "tiles"])
def absorbed_probabilities_kernel(
    x, a, bias, out, bias_batch, bias_head, bias_key, queries, keys, heads, tiles,
    C: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, FEW: tl.constexpr, FEW_PARTS: tl.constexpr,
    KEY_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The first of two kernels: probabilities `[B, N, H, WIDTH]`, BLOCK_M rows of one head a program."""
    program = tl.program_id(0)
    head = ((program // tiles) % heads).to(tl.int64)
    batch = (program // (tiles * heads)).to(tl.int64)
    first_row = (program % tiles) * BLOCK_M
    row_mask = first_row + tl.arange(0, BLOCK_M) < queries
    x += (batch * queries + first_row) * C
    out += ((batch * queries + first_row) * heads + head) * WIDTH
    a += (batch * heads + head) * keys * C
    bias += batch * bias_batch + head * bias_head
    if count_keys(bias, bias_key, 0, 1, keys, KEYS) <= FEW:
        write_probabilities(
            x, a, bias, out, heads * WIDTH, bias_key, row_mask, keys,
            C, FEW_PARTS, BLOCK_M, BLOCK_C, EVEN,
        )  # fmt: skip
    else:
        write_probabilities(
            x, a, bias, out, heads * WIDTH, bias_key, row_mask, keys,
            C, KEY_PARTS, BLOCK_M, BLOCK_C, EVEN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["bias_heads", "queries", "keys", "heads", "tiles"])
def absorbed_values_kernel(
    p, bias, vo, out_bias, residual, out, bias_batch, bias_head, bias_key, bias_heads, queries, keys, heads, tiles,
    C: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The second: Σ over heads and keys of probabilities `[B, N, H, WIDTH]` times vo, a BLOCK_M × BLOCK_C tile each."""
    program = tl.program_id(0)
    batch = (program // tiles).to(tl.int64)
    first_row = (program % tiles) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    row_mask = first_row + row < queries
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = (batch * queries + first_row) * C
    p += (batch * queries + first_row) * heads * WIDTH
    vo += batch * heads * keys * C
    bias += batch * bias_batch
    # One loop over heads and blocks of keys, so that loads run ahead across heads.
    blocks = tl.cdiv(count_keys(bias, bias_key, bias_head, bias_heads, keys, KEYS), BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for step in range(heads * blocks):
        head = step // blocks
        key = (step % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        live = tl.load(bias + head * bias_head + key * bias_key, mask=key < keys, other=EXCLUDED) != EXCLUDED
        p_mask = row_mask[:, None] & live[None, :]
        p_tile = tl.load(p + (row[:, None] * heads + head) * WIDTH + key[None, :], mask=p_mask, other=0.0)
        vo_tile = tl.load(
            vo + (head * keys + key)[:, None] * C + c[None, :], mask=tile_mask(live, c, C, EVEN), other=0.0
        )
        total = tl.dot(p_tile, vo_tile, total, input_precision="ieee")
    if residual is not None:
        residual += at
    finish(total, out_bias, residual, out + at, row, c, row_mask, C, EVEN)
