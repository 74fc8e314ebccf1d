"""The ways to compute a cross-attention layer from the keys and values of a context."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ... import ops
from ...ops import cpu
from ...ops.again import Again
from ...ops.attention import zero_excluded
from .layer import Images, Layer
from .rows import Segment
from .sources import Source

Attend = Callable[[torch.Tensor, torch.Tensor, Images | None], torch.Tensor]
"""A function from a layer's hidden states `[B, N, C]`, its context and its images to its output."""


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a layer's products: that of its hidden states, or autocast's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def projected(
    layer: Layer, source: Source, backend: str, context: torch.Tensor | None = None, *, readable: bool = False
) -> Attend:
    """The path of to_q, attention over the keys that are left, and to_out; with the images of IP-Adapters, if any.

    Args:
        context: the tensor that K and V are computed from once; None where they are computed at each call.
        readable: whether the weights of to_q and to_out may be read in place of calling them.
    """
    attn = layer.attn
    attend_text, kept = _text(layer, source, backend, context)
    if layer.kind == "images":
        return _beside_images(layer, attend_text)
    if kept is not None and readable and not source.attenuation and _by_library(kept[0], backend):
        return _projected_rows(layer, source, *kept)

    def attend(x: torch.Tensor, context: torch.Tensor, images: Images | None) -> torch.Tensor:
        out = attend_text(attn.to_q(x), context)
        for module in attn.to_out:
            out = module(out)
        return _finished(attn, out, x)

    return attend


def _beside_images(layer: Layer, attend_text: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Attend:
    """The layer's own processor for the images, and the text's part added to theirs before to_out."""

    def attend(x: torch.Tensor, context: torch.Tensor, images: Images | None) -> torch.Tensor:
        assert images is not None
        stand_in = _TextElsewhere(layer.attn, attend_text, context)
        states = context[:, :1], images.states
        out: torch.Tensor = layer.own(stand_in, x, encoder_hidden_states=states, ip_adapter_masks=images.masks)
        return out

    return attend


class _TextElsewhere:
    """A stand-in for the attention layer that an IP-Adapter's processor reads: its text is one key whose value is zero,
    and the text's part, computed elsewhere, is added before the output's projection.
    """

    def __init__(
        self, attn: Any, attend: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], context: torch.Tensor
    ) -> None:
        self._attn, self._attend, self._context = attn, attend, context
        self._text: Any = None
        self.to_out = (self._out, *attn.to_out[1:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_q(self, x: torch.Tensor) -> torch.Tensor:
        q: torch.Tensor = self._attn.to_q(x)
        self._text = self._attend(q, self._context)
        return q

    def to_k(self, rows: torch.Tensor) -> torch.Tensor:
        zeros: torch.Tensor = self._text.new_zeros(rows.shape[0], 1, self._text.shape[-1])
        return zeros

    to_v = to_k

    def _out(self, images: torch.Tensor) -> Any:
        return self._attn.to_out[0](self._text + images)


def _text(
    layer: Layer, source: Source, backend: str, context: torch.Tensor | None
) -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]:
    """The attention to the keys that are left, as a function from queries `[B, N, C]` and the context to `[B, N, C]`;
    and K and V where they are kept, else None.
    """
    attn = layer.attn

    def project(context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = source.project(layer, context)
        return split_heads(k, attn.heads), split_heads(v, attn.heads)

    kept = None if context is None else project(context)
    segments = tuple(source.rows.segments())

    def attend(q: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        # A projection that is called may return another dtype than autocast's.
        k, v = (rows.to(q.dtype) for rows in kept or project(context))

        def attend_to(part: slice, q: torch.Tensor) -> torch.Tensor:
            q = split_heads(q, attn.heads)
            k_part, bias = source.attenuated(q, k[part], layer.scale), source.keys.bias[part]
            heads: torch.Tensor = ops.biased_attention(q, k_part, v[part], bias, layer.scale, backend=backend)
            return heads.transpose(1, 2).flatten(2)

        return _by_segment(segments, q, [functools.partial(attend_to, one.distinct) for one in segments])

    return attend, kept


def _by_segment(
    segments: tuple[Segment, ...], x: torch.Tensor, computes: Sequence[Callable[[torch.Tensor], torch.Tensor]]
) -> torch.Tensor:
    """`[B, N, C]` of rows `[B, N, C]`, computed segment by segment, each of its folded rows."""
    if len(segments) == 1 and segments[0].times == 1:
        return computes[0](x)
    folded = (compute(one.folded(x)) for one, compute in zip(segments, computes, strict=True))
    made = [out.view(-1, x.shape[1], x.shape[2]) for out in folded]
    return made[0] if len(made) == 1 else torch.cat(made)


def _finished(attn: Any, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out = out + x if attn.residual_connection else out
    return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def _by_library(rows: torch.Tensor, backend: str) -> bool:
    return rows.device.type == "cpu" and backend in ("auto", "cpp")


def absorbed(
    layer: Layer, source: Source, backend: str, context: torch.Tensor, dtype: torch.dtype
) -> tuple[Attend, int] | None:
    """One operator in place of the layer, and the bytes it keeps; weights are read, and no module is called.

    None where float16 overflows: the products may be larger than their factors.

    Args:
        dtype: that of the products.
    """
    attn, on_cpu = layer.attn, context.device.type == "cpu"
    k, v = (split_heads(rows, attn.heads).float() for rows in source.project(layer, context))  # [B, H, n, D]
    to_q, to_out = attn.to_q, attn.to_out[0]
    q_weight, o_weight = (module.weight.detach().to(dtype).float() for module in (to_q, to_out))
    out_bias = None if to_out.bias is None else to_out.bias.detach().to(dtype)
    bias = source.keys.bias
    # Computed in float32, and rounded once.
    with torch.autocast(context.device.type, enabled=False):
        a = k @ q_weight.view(attn.heads, -1, q_weight.shape[1]) * layer.scale  # [B, H, n, C]
        vo = v @ o_weight.view(o_weight.shape[0], attn.heads, -1).permute(1, 2, 0)
        if to_q.bias is not None:
            shift = (k @ to_q.bias.float().view(attn.heads, -1, 1)).squeeze(-1) * layer.scale
            bias = bias.unsqueeze(1) + shift  # [B, H, n]
    vo = vo.to(dtype)
    a = a if on_cpu else a.to(dtype)
    if dtype == torch.float16 and not (a.isfinite().all() & vo.isfinite().all()):
        return None
    if on_cpu:
        return _absorbed_rows(attn, a, bias, vo, out_bias, source)

    return _absorbed_launches(attn, a, bias, zero_excluded(vo, bias), out_bias, source, backend)


def _absorbed_launches(
    attn: Any,
    a: torch.Tensor,
    bias: torch.Tensor,
    vo: torch.Tensor,
    out_bias: torch.Tensor | None,
    source: Source,
    backend: str,
) -> tuple[Attend, int]:
    segments, dtype = tuple(source.rows.segments()), vo.dtype
    parts = [one.distinct for one in segments]
    computes = [Again(a[part], bias[part], vo[part], out_bias, backend) for part in parts]

    def attend(x: torch.Tensor, context: torch.Tensor, images: Images | None) -> torch.Tensor:
        return _finished(attn, _by_segment(segments, x.to(dtype), computes), x)

    return attend, a.nbytes + vo.nbytes


def absorbed_bytes(source: Source, heads: int, channels: int, dtype: torch.dtype, device: torch.device) -> int:
    """The largest number of bytes that `absorbed` keeps of a source."""
    if device.type != "cpu":
        return 2 * source.keys.index.numel() * heads * channels * dtype.itemsize
    rows = [heads * _padded(left, heads) for left in source.keys.counts]
    of_a = dtype.itemsize if dtype == torch.bfloat16 else torch.float32.itemsize
    return channels * sum(count * dtype.itemsize + -(-count // cpu.PANEL) * cpu.PANEL * of_a for count in rows)


def _padded(left: int, heads: int) -> int:
    """The number of keys of a head, rounded up so that all heads together have a multiple of 8."""
    step = 8 // math.gcd(heads, 8)
    return -(-max(1, left) // step) * step


def _absorbed_rows(
    attn: Any, a: torch.Tensor, bias: torch.Tensor, vo: torch.Tensor, out_bias: torch.Tensor | None,
    source: Source,
) -> tuple[Attend, int]:  # fmt: skip
    """The absorbed path on the CPU: every sequence is as wide as its own keys, up to a multiple of 8 over all heads."""
    heads, channels, dtype = a.shape[1], a.shape[3], vo.dtype
    parts = []
    for b, left in enumerate(source.keys.counts):
        width = _padded(left, heads)
        own_a, own_vo = (rows[b, :, :width].reshape(-1, channels) for rows in (a, vo))  # [H·n, C]
        own_bias = bias[b, ..., :width].reshape(-1, width).contiguous()
        parts.append((cpu.Softmax(own_a, own_bias, dtype), cpu.Product(own_vo.mT, out_bias)))

    segments = tuple(source.rows.segments())

    def attend(x: torch.Tensor, context: torch.Tensor, images: Images | None) -> torch.Tensor:
        rows = x.to(dtype).contiguous()
        out = torch.empty_like(rows)
        for one in segments:
            for row, made, part in zip(one.folded(rows), one.folded(out), parts[one.distinct], strict=True):
                cpu.absorb_rows(row, *part, made)
        return _finished(attn, out, x)

    return attend, sum(softmax.nbytes + output.nbytes for softmax, output in parts)


def _projected_rows(layer: Layer, source: Source, k: torch.Tensor, v: torch.Tensor) -> Attend:
    """The projected path on the CPU: every sequence has only its own keys, and its queries go through the layer in
    tiles; sequences with few queries go through it together.
    """
    attn = layer.attn
    to_q, to_out = (
        cpu.Product(module.weight.detach().to(k.dtype), None if module.bias is None else module.bias.to(k.dtype))
        for module in (attn.to_q, attn.to_out[0])
    )
    keys, scale, segments = source.keys, layer.scale, tuple(source.rows.segments())

    @functools.cache
    def part(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        left = max(keys.counts[start:end])
        return k[start:end, :, :left], v[start:end, :, :left], keys.bias[start:end, None, :left].contiguous()

    def attend(x: torch.Tensor, context: torch.Tensor, images: Images | None) -> torch.Tensor:
        rows = x.to(k.dtype).contiguous()
        whole = segments[0].folded(rows)
        if len(segments) == 1 and len(whole) <= cpu.sequences_at_once(whole):
            made = cpu.project_batch(whole, to_q, *part(0, len(whole)), scale, to_out)
            return _finished(attn, made.view(x.shape), x)
        out = torch.empty_like(rows)
        for one in segments:
            folded, made, first = one.folded(rows), one.folded(out), one.distinct.start
            at_once = cpu.sequences_at_once(folded)
            for start in range(0, len(folded), at_once):
                some = slice(start, start + at_once)
                kept = part(first + start, min(first + start + at_once, one.distinct.stop))
                cpu.project_rows(folded[some], to_q, *kept, scale, to_out, made[some])
        return _finished(attn, out, x)

    return attend


def split_heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """`[B, n, H·D]` as `[B, H, n, D]`."""
    return rows.view(*rows.shape[:-1], heads, -1).transpose(1, 2)
