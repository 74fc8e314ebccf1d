"""What the operator tests share: backends at hand, layouts, and the tolerance."""

from __future__ import annotations

from collections.abc import Callable

import torch

from memkern.ops import BACKENDS, backends

CPU = torch.device("cpu")
AVAILABLE = [name for name in BACKENDS if name != "auto" and not backends.refusals(name, CPU)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}
"""The same values in other strides."""


def assert_accurate(actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> None:
    """The error against float64 is at most twice that of plain torch at the same dtype, plus one eps."""
    assert actual.dtype == same_dtype.dtype
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps * exact.abs().max()
    error = (actual.double() - exact).abs().max()
    assert error <= 2 * (same_dtype.double() - exact).abs().max() + eps


def random_plan(batch: int, length: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A source in [0, rows) and a scale that is 0, 1 or between, `[batch, length]` each."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(0, rows, (batch, length), generator=generator, dtype=torch.int32)
    scale = torch.rand(batch, length, generator=generator) * 2 - 1
    kind = torch.randint(0, 3, (batch, length), generator=generator)
    return source, torch.where(kind == 0, 0.0, torch.where(kind == 1, 1.0, scale))
