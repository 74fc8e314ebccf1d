"""The kernels of `absorbed_attention`: x `[B, N, C]`, a and vo `[B, H, n, C]`, bias `[B, H, n]` → `[B, N, C]`.

Two matrix products; the probabilities between them are in memory, in practice in the L2 cache. A sequence's keys are
counted up to its last one that is not excluded, rounded up to a multiple of 8; the probabilities of its heads lie
next to each other, so that the second product has one long inner dimension and no gap.
"""

import triton
import triton.language as tl

from .tiles import count_keys, load_parts, reciprocal, softmax_parts, span, sum_parts, tile_mask, zeros


@triton.jit
def counted_keys(bias, bias_key, bias_head, bias_heads, keys, KEYS: tl.constexpr, STEP: tl.constexpr):
    """The number of keys of a sequence that are computed: `count_keys`, rounded up to a multiple of STEP."""
    return STEP * tl.cdiv(count_keys(bias, bias_key, bias_head, bias_heads, keys, KEYS), STEP)


@triton.jit
def write_probabilities(
    x, a, bias, out, out_row, bias_head, bias_key, row_mask, keys, counted,
    C: tl.constexpr, HEADS: tl.constexpr, KEY_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """softmax(x · aᵀ + bias) of BLOCK_M rows for HEADS heads, over the first `counted` keys of KEY_PARTS, into memory.

    A row of a belongs to one key only: the row of an excluded key affects only its own logit, which is not used.
    """
    row = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_C)
    logits = ()
    for _ in tl.static_range(HEADS):
        for i in tl.static_range(len(KEY_PARTS)):
            logits = logits + (zeros(BLOCK_M, KEY_PARTS[i]),)
    for start in range(0, C, BLOCK_C):
        c = start + channel
        x_tile = tl.load(x + row[:, None] * C + c[None, :], mask=tile_mask(row_mask, c, C, EVEN), other=0.0)
        sums = ()
        for head in tl.static_range(HEADS):
            first = 0
            for i in tl.static_range(len(KEY_PARTS)):
                key = span(first, KEY_PARTS[i])
                a_at = (head * keys + key)[:, None] * C + c[None, :]
                a_tile = tl.load(a + a_at, mask=tile_mask(key < keys, c, C, EVEN), other=0.0)
                total = logits[head * len(KEY_PARTS) + i]
                sums = sums + (tl.dot(x_tile, tl.trans(a_tile), total, input_precision="ieee"),)
                first += KEY_PARTS[i]
        logits = sums
    for head in tl.static_range(HEADS):
        own = ()
        for i in tl.static_range(len(KEY_PARTS)):
            own = own + (logits[head * len(KEY_PARTS) + i],)
        biases = load_parts(bias + head * bias_head, bias_key, keys, float("-inf"), KEY_PARTS)
        terms = softmax_parts(own, biases, 1.0, KEY_PARTS, BLOCK_M)
        inverse = reciprocal(sum_parts(terms, KEY_PARTS, BLOCK_M))
        first = 0
        for i in tl.static_range(len(KEY_PARTS)):
            key = span(first, KEY_PARTS[i])
            p = (terms[i] * inverse[:, None]).to(out.dtype.element_ty)
            out_at = row[:, None] * out_row + head * counted + key[None, :]
            tl.store(out + out_at, p, mask=row_mask[:, None] & (key < counted)[None, :])
            first += KEY_PARTS[i]


@triton.jit(do_not_specialize=["bias_heads", "queries", "keys", "heads", "tiles"])
def absorbed_probabilities_kernel(
    x, a, bias, out, bias_batch, bias_head, bias_key, bias_heads, queries, keys, heads, tiles,
    C: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, KEYS: tl.constexpr, FEW: tl.constexpr,
    FEW_PARTS: tl.constexpr, KEY_PARTS: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Probabilities of BLOCK_M rows for HEADS heads: the columns from head · counted of out `[B, N, H · WIDTH]`.

    The heads of a tile follow each other, so that its x is read from the cache. A sequence with at most FEW keys takes
    the narrower of two bodies.
    """
    program = tl.program_id(0)
    groups = heads // HEADS
    head = ((program % groups) * HEADS).to(tl.int64)
    tile = program // groups
    batch = (tile // tiles).to(tl.int64)
    first_row = (tile % tiles) * BLOCK_M
    row_mask = first_row + tl.arange(0, BLOCK_M) < queries
    bias += batch * bias_batch
    counted = counted_keys(bias, bias_key, bias_head, bias_heads, keys, KEYS, STEP)
    bias += head * bias_head
    x += (batch * queries + first_row) * C
    a += (batch * heads + head) * keys * C
    out += (batch * queries + first_row) * heads * WIDTH + head * counted
    if counted <= FEW:
        write_probabilities(
            x, a, bias, out, heads * WIDTH, bias_head, bias_key, row_mask, keys, counted,
            C, HEADS, FEW_PARTS, BLOCK_M, BLOCK_C, EVEN,
        )  # fmt: skip
    else:
        write_probabilities(
            x, a, bias, out, heads * WIDTH, bias_head, bias_key, row_mask, keys, counted,
            C, HEADS, KEY_PARTS, BLOCK_M, BLOCK_C, EVEN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["bias_heads", "queries", "keys", "heads", "tiles"])
def absorbed_values_kernel(
    p, bias, vo, out_bias, residual, out, bias_batch, bias_head, bias_key, bias_heads, queries, keys, heads, tiles,
    C: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, KEYS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The product of those probabilities with vo, which is 0 for excluded keys: BLOCK_M × BLOCK_C of the output.

    The inner dimension runs over all heads' counted keys, BLOCK_K at a time.
    """
    program = tl.program_id(0)
    batch = (program // tiles).to(tl.int64)
    first_row = (program % tiles) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    row_mask = first_row + row < queries
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = (batch * queries + first_row) * C
    p_row = heads * WIDTH
    p += (batch * queries + first_row) * p_row
    vo += batch * heads * keys * C
    counted = counted_keys(bias + batch * bias_batch, bias_key, bias_head, bias_heads, keys, KEYS, STEP)
    depth = heads * counted
    per_key = 1.0 / tl.maximum(counted, 1).to(tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, depth, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        # Half a key from the edges, float32 cannot round into the next head.
        head = ((inner + 0.5) * per_key).to(tl.int32)
        key = inner - head * counted
        exists = (inner < depth) & (key < keys)
        p_mask = row_mask[:, None] & (inner < depth)[None, :]
        p_tile = tl.load(p + row[:, None] * p_row + inner[None, :], mask=p_mask, other=0.0)
        vo_at = (head * keys + key)[:, None] * C + c[None, :]
        vo_tile = tl.load(vo + vo_at, mask=tile_mask(exists, c, C, EVEN), other=0.0)
        total = tl.dot(p_tile, vo_tile, total, input_precision="ieee")
    mask = tile_mask(row_mask, c, C, EVEN)
    within = row[:, None] * C + c[None, :]
    if out_bias is not None:
        total += tl.load(out_bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        total += tl.load(residual + at + within, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at + within, total.to(out.dtype.element_ty), mask=mask)
