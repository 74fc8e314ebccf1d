"""The attention operators on a CPU: torch's matrix products around the compiled library's softmax."""

from __future__ import annotations

import torch

from .attention import per_head, without_excluded

_LIBRARY = torch.library.Library("memkern_cpu", "DEF")
# logits [N, H, n], contiguous, becomes softmax(logits + bias) over n, in float; bias float32 [1, n] or [H, n].
_LIBRARY.define("biased_softmax_(Tensor(a!) logits, Tensor bias) -> ()")
_biased_softmax_ = torch.ops.memkern_cpu.biased_softmax_.default

TILE_BYTES = 1 << 21
"""Of logits, so that they stay in cache between the two products."""


def absorb_rows(
    x: torch.Tensor, a: torch.Tensor, bias: torch.Tensor, vo: torch.Tensor, out_bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """`absorbed_attention` of one sequence into `out`, float32, float16 or bfloat16.

    Args:
        x, out: `[N, C]`, contiguous.
        a, vo: `[H·n, C]`, contiguous; their rows for excluded keys are finite.
        bias: float32 `[1, n]` or `[H, n]`, contiguous.
        out_bias: `[C]`.
    """
    keys = bias.shape[-1]
    tile = max(64, TILE_BYTES // max(1, a.shape[0] * x.itemsize))
    for start in range(0, x.shape[0], tile):
        rows = slice(start, start + tile)
        logits = torch.mm(x[rows], a.mT)  # [tile, H·n]
        _biased_softmax_(logits.view(len(logits), -1, keys), bias)
        if out_bias is None:
            torch.mm(logits, vo, out=out[rows])
        else:
            torch.addmm(out_bias, logits, vo, out=out[rows])


def absorbed_attention(
    x: torch.Tensor,
    a: torch.Tensor,
    bias: torch.Tensor,
    vo: torch.Tensor,
    out_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """See `memkern.ops.absorbed_attention`; a sequence's keys behind the last that is not excluded are skipped."""
    out = torch.empty(x.shape, dtype=x.dtype)
    x, shared = x.contiguous(), per_head(bias).squeeze(2)  # [B, 1 or H, n]
    live = (shared != -torch.inf).any(1)  # [B, n]
    for b in range(x.shape[0]):
        left = int((live[b] * torch.arange(1, live.shape[1] + 1)).amax()) if live.shape[1] else 0
        if left == 0 or out.numel() == 0:
            out[b] = 0 if out_bias is None else out_bias
            continue
        kept_a, kept_vo = (
            without_excluded(rows[b : b + 1, :, :left], bias[b : b + 1, ..., :left]).to(x.dtype).reshape(-1, x.shape[2])
            for rows in (a, vo)
        )
        absorb_rows(x[b], kept_a, shared[b, :, :left].contiguous(), kept_vo, out_bias, out[b])
    return out if residual is None else out.add_(residual)


def biased_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `memkern.ops.biased_attention`; float32, in which torch's own attention takes the bias exactly."""
    batch, heads, queries, width = q.shape
    out = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    if out.numel() and k.shape[2]:
        added = per_head(bias).expand(batch, -1, queries, -1)
        kept_k, kept_v = without_excluded(k, bias), without_excluded(v, bias)
        attended = torch.nn.functional.scaled_dot_product_attention(q, kept_k, kept_v, attn_mask=added, scale=scale)
        empty = (per_head(bias) == -torch.inf).all(-1, keepdim=True)
        if empty.any():
            attended = attended.masked_fill(empty, 0)
        return attended if attended.stride() == out.stride() else out.copy_(attended)
    return out.zero_()
