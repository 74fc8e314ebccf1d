"""The error of a cross-attention layer's output against float64, by path, dtype and size of the logits, as a table.

    python benchmarks/accuracy.py                    # CPU
    TRITON_INTERPRET=1 python benchmarks/accuracy.py # Triton's kernels, in its interpreter

Cells: the error of memkern's path over that of diffusers' `AttnProcessor2_0` in the same dtype, root mean squares over
all values of some layers; in brackets the same of the largest errors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from memkern import ops
from memkern.ops import backends
from memkern.pipelines.attention.layer import Layer
from memkern.pipelines.attention.paths import absorbed, projected, split_heads
from memkern.pipelines.attention.sources import unedited

LOGITS = (1.0, 100.0, 10_000.0)
"""Standard deviations of the logits."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ((256, 320, 8), (64, 1280, 8), (128, 640, 10))
"""N, C and H."""


class Case:
    """A layer in a dtype whose logits have a standard deviation, its input, and its output in float64."""

    @torch.no_grad()
    def __init__(
        self, size: tuple[int, int, int], logits: float, dtype: torch.dtype, seed: int = 0, keys: int = 77
    ) -> None:
        queries, width, heads = size
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = Attention(
                width, cross_attention_dim=96, heads=heads, dim_head=width // heads, processor=AttnProcessor2_0()
            ).eval()
        x, context = drawn(1, queries, width), drawn(1, keys, 96)
        q, k = (split_heads(rows, heads) for rows in (self.layer.to_q(x), self.layer.to_k(context)))
        factor = (logits / (q @ k.mT * self.layer.scale).std()) ** 0.5
        for module in (self.layer.to_q, self.layer.to_k):
            module.weight.mul_(factor)
        self.layer, self.x, self.context = self.layer.to(dtype), x.to(dtype), context.to(dtype)
        self.whole = Layer(self.layer, self.layer.processor)
        self.exact = self.in_float64()

    def in_float64(self) -> torch.Tensor:
        """The layer as it is now, of the same values in float64."""
        wide = copy.deepcopy(self.layer).double()
        out: torch.Tensor = wide(self.x.double(), encoder_hidden_states=self.context.double())
        return out

    def diffusers(self) -> torch.Tensor:
        """The layer by its own processor."""
        return self.layer(self.x, encoder_hidden_states=self.context)

    def absorbed(self) -> torch.Tensor:
        """The layer as a patched pipeline computes it on this device; projected where float16 has no room."""
        made = absorbed(self.whole, unedited(self.context), "auto", self.context, self.x.dtype)
        return self.projected() if made is None else made[0](self.x, self.context, None)

    def projected(self) -> torch.Tensor:
        """The layer as a patched pipeline computes it where keys are many."""
        attend = projected(self.whole, unedited(self.context), "auto", self.context, readable=True)
        return attend(self.x, self.context, None)

    def by_operator(self, name: str, backend: str) -> torch.Tensor:
        """The layer by an operator of a backend, on tensors of the layer's own dtype."""
        layer, heads = self.layer, self.layer.heads
        k, v = (split_heads(module(self.context), heads) for module in (layer.to_k, layer.to_v))
        bias = torch.zeros(k.shape[0], k.shape[2], dtype=torch.float32)
        if name == "biased_attention":
            q = split_heads(layer.to_q(self.x), heads)
            out = ops.biased_attention(q, k, v, bias, layer.scale, backend=backend)
            return layer.to_out[0](out.transpose(1, 2).flatten(2))
        weights = layer.to_q.weight.float(), layer.to_out[0].weight.float()
        a = (k.float() @ weights[0].unflatten(0, (heads, -1)) * layer.scale).to(k.dtype)
        vo = (v.float() @ weights[1].unflatten(1, (heads, -1)).permute(1, 2, 0)).to(k.dtype)
        return ops.absorbed_attention(self.x, a, bias, vo, layer.to_out[0].bias, backend=backend)


Path = Callable[[Case], torch.Tensor]


def paths() -> dict[str, Path]:
    """The paths that this process can compute, by name."""
    named = "triton" if backends.INTERPRETING else "torch"
    found: dict[str, Path] = {
        f"{operator}, {named}": lambda case, operator=operator: case.by_operator(operator, named)
        for operator in ("absorbed_attention", "biased_attention")
    }
    if backends.INTERPRETING or backends.installed("cpp"):
        return found
    return {"layer, absorbed": Case.absorbed, "layer, projected": Case.projected, **found}


def errors(out: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """The mean square of the error, and its largest."""
    error = out.double() - exact
    return float(error.square().mean()), float(error.abs().max())


@torch.no_grad()
def ratios(path: Path, logits: float, dtype: torch.dtype, seeds: int = 4, sizes=SIZES) -> tuple[float, float]:
    """The error of a path over diffusers', root mean square and largest, over layers of all sizes."""
    ours, theirs = [], []
    for size in sizes:
        for seed in range(seeds):
            case = Case(size, logits, dtype, seed)
            ours.append(errors(path(case), case.exact))
            theirs.append(errors(case.diffusers(), case.exact))
    squares = [sum(square for square, _ in some) for some in (ours, theirs)]
    largest = [max(most for _, most in some) for some in (ours, theirs)]
    return (squares[0] / squares[1]) ** 0.5, largest[0] / largest[1]


def rows() -> Iterator[str]:
    """The lines of the table."""
    yield "| path | dtype | " + " | ".join(f"logits of {size:,.0f}" for size in LOGITS) + " |"
    yield "| --- | --- |" + " --- |" * len(LOGITS)
    for name, path in paths().items():
        for dtype in DTYPES:
            if backends.INTERPRETING and dtype == torch.bfloat16:
                continue  # the interpreter computes it wrongly
            found = [ratios(path, size, dtype) for size in LOGITS]
            cells = " | ".join(f"{square:.2f} ({most:.2f})" for square, most in found)
            yield f"| {name} | {str(dtype).removeprefix('torch.')} | {cells} |"


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
