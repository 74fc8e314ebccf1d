"""The attention operators on a CPU: torch's matrix products around the compiled library's softmax."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .attention import per_head, without_excluded

_LIBRARY = torch.library.Library("memkern_cpu", "DEF")
# logits float32 [N, H, n], contiguous, becomes softmax(logits + bias) over n; bias float32 [1, n] or [H, n].
_LIBRARY.define("biased_softmax_(Tensor(a!) logits, Tensor bias) -> ()")
# x [N, C], contiguous, a [H·n, C] packed: softmax(x aᵀ + bias) [N, H·n] in x's dtype, the logits in float32.
_LIBRARY.define("absorbed_softmax(Tensor x, Tensor a, Tensor bias, int heads) -> Tensor")
# a [O, C], contiguous: its columns in panels, as bfloat16 where a is bfloat16 and the processor multiplies it.
_LIBRARY.define("pack_panels(Tensor a) -> Tensor")
# q [B, N, H, D], contiguous, k and v [B, H, n, D], bias float32 [B, 1, n] or [B, H, n]: [B, N, H, D].
_LIBRARY.define("biased_attention(Tensor q, Tensor k, Tensor v, Tensor bias, float scale) -> Tensor")
# q, k and bias as before, weight float32 [B, n]: sums of p over queries [B, H, n], and p · weight [B, H, N].
_LIBRARY.define("attention_mass(Tensor q, Tensor k, Tensor bias, Tensor weight, float scale) -> (Tensor, Tensor)")
_biased_softmax_ = torch.ops.memkern_cpu.biased_softmax_.default
_absorbed_softmax = torch.ops.memkern_cpu.absorbed_softmax.default
_pack_panels = torch.ops.memkern_cpu.pack_panels.default
_attention_mass = torch.ops.memkern_cpu.attention_mass.default
_biased_attention = torch.ops.memkern_cpu.biased_attention.default

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that the operators below take; they compute in float32. The reference takes all others."""

PANEL = 48
"""The most columns of a that are packed together."""

TILE_BYTES = 1 << 22
"""Bytes of probabilities per tile: they stay in cache between the two products."""

PROJECTED_BYTES = 1 << 20
"""Bytes of projected queries per tile: they and the attention's output stay in cache, in memory that is used again."""


class Product:
    """`rows weightᵀ + bias` for many rows. The weight is reordered once, where oneDNN serves this dtype here.

    Args:
        weight: `[O, I]`, float32, float16 or bfloat16.
        bias: `[O]`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, reorder: bool = True) -> None:
        self.bias = bias
        self.outputs = weight.shape[0]
        self.reordered = reorder and _serves(weight.dtype)
        weight = weight.contiguous()  # in float16 torch takes six times as long otherwise
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.reordered else weight

    @property
    def nbytes(self) -> int:
        """The bytes that are kept."""
        return self.weight.numel() * self.weight.itemsize

    def __call__(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`[N, O]`, in `out` if that is given."""
        if self.reordered:
            made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
            return made if out is None else out.copy_(made)
        if self.bias is None:
            return torch.mm(rows, self.weight.mT, out=out)
        return torch.addmm(self.bias, rows, self.weight.mT, out=out)


@functools.cache
def _serves(dtype: torch.dtype) -> bool:
    """True if oneDNN multiplies in this dtype on this processor; torch's own compiler checks the same.

    Always false for float32: there its sums, one chain over all inputs, are two to four times less accurate than MKL's.
    """
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in names or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and bool(getattr(torch.ops.mkldnn, names[dtype])())


@functools.cache
def _has_tiles() -> bool:
    """True if the processor multiplies bfloat16 by tiles (AMX): two products of oneDNN are faster than one of ours."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and bool(asked()) and _serves(torch.bfloat16)


class Softmax:
    """`softmax(rows aᵀ + bias)` over each head's keys, for many rows. The logits are float32 for rows of any dtype.

    Args:
        a: `[H·n, C]`; multiplied as it is, or as bfloat16 where the rows are.
        bias: float32 `[1, n]` or `[H, n]`, contiguous; rows of a that it excludes are finite.
        dtype: of the rows and of the result: float32, float16 or bfloat16.
    """

    def __init__(self, a: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> None:
        self.bias, self.outputs = bias, a.shape[0]
        self._heads = a.shape[0] // max(1, bias.shape[1])
        a = a.to(dtype if dtype == torch.bfloat16 else torch.float32).contiguous()
        multiplied = dtype == torch.float32 or (dtype == torch.bfloat16 and _has_tiles())
        self._product = Product(a) if multiplied else None
        self._panels: Any = None if multiplied else _pack_panels(a)

    @property
    def nbytes(self) -> int:
        """The bytes that are kept."""
        kept: Product | torch.Tensor = self._product or self._panels
        return kept.nbytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`[N, H·n]` for contiguous rows `[N, C]`."""
        if self._product is None:
            made: torch.Tensor = _absorbed_softmax(rows, self._panels, self.bias, self._heads)
            return made
        p = self._product(rows)
        if rows.dtype == torch.bfloat16:
            # A second product gives what the rounding of the first one lost.
            rest = torch.ops.mkldnn._linear_pointwise.binary(rows, p, self._product.weight, None, "sub")
            p = p.float().add_(rest)
        _biased_softmax_(p.view(len(p), self._heads, -1), self.bias)
        return p.to(rows.dtype)


def _tiles(count: int, most: int) -> list[slice]:
    """Rows 0…count in parts of equal size: about `most` rows, and at least 64."""
    size = max(1, -(-count // max(1, round(count / max(64, most)))))
    return [slice(start, start + size) for start in range(0, count, size)]


def absorb_rows(x: torch.Tensor, softmax: Softmax, output: Product, out: torch.Tensor) -> None:
    """`absorbed_attention` of one sequence into `out`, float32, float16 or bfloat16.

    Args:
        x, out: `[N, C]`, contiguous.
        softmax: of a, `[H·n, C]`, and the keys' bias.
        output: of voᵀ, `[C, H·n]`, and the output's bias; finite for keys that are excluded.
    """
    for rows in _tiles(x.shape[0], TILE_BYTES // max(1, softmax.outputs * x.itemsize)):
        output(softmax(x[rows]), out[rows])


def project_rows(
    x: torch.Tensor, to_q: Product, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float,
    to_out: Product, out: torch.Tensor,
) -> None:  # fmt: skip
    """A layer of some sequences into `out`: to_q, `biased_attention`, to_out; float32, float16 or bfloat16.

    Args:
        x, out: `[B, N, C]`, contiguous; B is 1, or as many as `sequences_at_once` says.
        k, v: `[B, H, n, D]`.
        bias: float32 `[B, 1, n]`, contiguous.
    """
    if len(x) > 1:
        out.copy_(project_batch(x, to_q, k, v, bias, scale, to_out))
        return
    x, out = x[0], out[0]
    for rows in _tiles(x.shape[0], PROJECTED_BYTES // max(1, x.shape[1] * x.itemsize)):
        to_out(_attended(to_q(x[rows]), k, v, bias, scale), out[rows])


def project_batch(
    x: torch.Tensor, to_q: Product, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float, to_out: Product
) -> torch.Tensor:
    """The same for all sequences at once, where they have few queries."""
    out = to_out(_attended(to_q(x.view(-1, x.shape[2])), k, v, bias, scale))
    return out.view(x.shape)


def sequences_at_once(x: torch.Tensor) -> int:
    """The best number of sequences of hidden states `[B, N, C]` to project together: weights are read once for them."""
    return max(1, PROJECTED_BYTES // max(1, x.shape[1] * x.shape[2] * x.itemsize))


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    heads: torch.Tensor = _biased_attention(q.view(k.shape[0], -1, k.shape[1], k.shape[3]), k, v, bias, scale)
    return heads.view(q.shape)


def absorbed_attention(
    x: torch.Tensor,
    a: torch.Tensor,
    bias: torch.Tensor,
    vo: torch.Tensor,
    out_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """See `memkern.ops.absorbed_attention`; a sequence's keys after the last one that is not excluded are skipped."""
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    x, shared = x.contiguous(), per_head(bias).squeeze(2)  # [B, 1 or H, n]
    live = (shared != -torch.inf).any(1)  # [B, n]
    for b in range(x.shape[0]):
        left = max(live[b].nonzero().flatten().tolist(), default=-1) + 1
        if left == 0 or out.numel() == 0:
            out[b] = 0 if out_bias is None else out_bias
            continue
        kept_a, kept_vo = (
            without_excluded(rows[b : b + 1, :, :left], bias[b : b + 1, ..., :left]).to(x.dtype).reshape(-1, x.shape[2])
            for rows in (a, vo)
        )
        softmax = Softmax(kept_a, shared[b, :, :left].contiguous(), x.dtype)
        absorb_rows(x[b], softmax, Product(kept_vo.mT, out_bias, reorder=False), out[b])
    return out if residual is None else out.add_(residual)


def biased_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `memkern.ops.biased_attention`; float32, float16 or bfloat16, computed in float32."""
    k, v = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (k, v))
    by_query = q.transpose(1, 2).contiguous()  # [B, N, H, D]
    out: torch.Tensor = _biased_attention(by_query, k, v, per_head(bias).squeeze(2).contiguous(), scale)
    return out.transpose(1, 2)


def attention_mass(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `memkern.ops.attention_mass`; float32, float16 or bfloat16, computed in float32."""
    k = k if k.stride(-1) == 1 else k.contiguous()
    by_query = q.transpose(1, 2).contiguous()  # [B, N, H, D]
    shared = per_head(bias).squeeze(2).contiguous()
    sums, masses = _attention_mass(by_query, k, shared, weight.contiguous(), scale)
    return sums.div_(max(1, q.shape[2])), masses
