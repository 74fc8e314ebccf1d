"""One cross-attention layer in every way that the benchmarks compare, all of them the same function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from memkern import ops

LENGTH = 77


class CrossAttention:
    """A layer with random weights, a batch of hidden states, and a context whose last rows are zero.

    Args:
        queries: N.
        width: C.
        heads: H.
        context_width: D of the context.
        keys: per row of the batch, the number of keys left of 77 once the zero rows are one key.
    """

    def __init__(
        self,
        queries: int,
        width: int,
        heads: int,
        context_width: int,
        keys: Sequence[int],
        dtype: torch.dtype,
        device: str,
    ) -> None:
        torch.manual_seed(0)
        options = {"cross_attention_dim": context_width, "heads": heads, "dim_head": width // heads}
        self.layer = Attention(query_dim=width, processor=AttnProcessor2_0(), **options).to(device, dtype).eval()
        self.x = torch.randn(len(keys), queries, width).to(device, dtype)
        self.context = torch.randn(len(keys), LENGTH, context_width).to(device, dtype)
        self.bias = torch.full((len(keys), max(keys)), -math.inf, device=device)
        for row, left in enumerate(keys):
            self.bias[row, :left] = 0
            if left < LENGTH:
                # left - 1 rows as they are, and one zero key for all that follow.
                self.context[row, left - 1 :] = 0
                self.bias[row, left - 1] = math.log(LENGTH - left + 1)
        self._multiply_out()

    @torch.no_grad()
    def _multiply_out(self) -> None:
        layer, heads = self.layer, self.layer.heads
        rows = self.context[:, : self.bias.shape[1]]
        k, v = (
            projection(rows).unflatten(-1, (heads, -1)).transpose(1, 2) for projection in (layer.to_k, layer.to_v)
        )  # [B, H, n, D]
        self.k, self.v = k, v
        self.a = (k @ layer.to_q.weight.unflatten(0, (heads, -1)) * layer.scale).contiguous()
        vo = v @ layer.to_out[0].weight.unflatten(1, (heads, -1)).permute(1, 2, 0)
        self.vo = vo.masked_fill((self.bias == -math.inf)[:, None, :, None], 0).contiguous()

    def implementations(self, backend: str = "auto") -> dict[str, Callable[[], torch.Tensor]]:
        """Name → a call that computes the layer's output `[B, N, C]`; memkern's with `backend`."""
        layer, x, context = self.layer, self.x, self.context
        mask = torch.nn.functional.pad(self.bias, (0, LENGTH - self.bias.shape[1]), value=-math.inf)
        mask = mask[:, None].to(x.dtype)
        compiled = torch.compile(layer)
        out_bias = layer.to_out[0].bias

        def projected() -> torch.Tensor:
            q = layer.to_q(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            heads = ops.biased_attention(q, self.k, self.v, self.bias, layer.scale, backend=backend)
            return layer.to_out[0](heads.transpose(1, 2).flatten(2))

        return {
            "diffusers": lambda: layer(x, encoder_hidden_states=context),
            "diffusers, masked": lambda: layer(x, encoder_hidden_states=context, attention_mask=mask),
            "diffusers, compiled": lambda: compiled(x, encoder_hidden_states=context),
            "memkern, projected": projected,
            "memkern, absorbed": lambda: ops.absorbed_attention(
                x, self.a, self.bias, self.vo, out_bias, zeroed=True, backend=backend
            ),
            "reference, absorbed": lambda: ops.absorbed_attention(
                x, self.a, self.bias, self.vo, out_bias, backend="torch"
            ),
        }
