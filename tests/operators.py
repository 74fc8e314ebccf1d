"""Shared by the operators' tests: backends at hand, layouts, and the tolerance."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from memkern.ops import backends

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Target:
    """A backend on a device; calling it runs an operator there, with tensors from anywhere and results on the CPU."""

    backend: str
    device: str

    def __call__(self, operator: Callable[..., Any], *arguments: Any) -> Any:
        results = operator(*map(self.put, arguments), backend=self.backend)
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, results)

    def put(self, value: Any) -> Any:
        """A tensor on the device, with its strides if it is there already; anything else as it is."""
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def serves(self, dtype: torch.dtype) -> bool:
        """True if the backend computes in `dtype`."""
        return not backends.refusals(self.backend, torch.device(self.device), dtype)

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


def targets(*names: str) -> list[Any]:
    """The backends that can run in this process, each with the layer of tests it belongs to.

    The plain layer is the CPU's; `TRITON_INTERPRET=1` makes the process that of the interpreter's layer, and a
    GPU adds its own.
    """
    if backends.INTERPRETING:
        found = [("triton", "cpu", [pytest.mark.interpreter])]
    else:
        found = [(name, "cpu", []) for name in ("cpp", "torch")]
        if torch.cuda.is_available():
            found += [(name, "cuda", [pytest.mark.gpu]) for name in ("cuda", "triton", "torch")]
    return [
        pytest.param(Target(name, device), marks=marks, id=f"{name}-{device}")
        for name, device, marks in found
        if name in names and not backends.installed(name)
    ]


def raising(found: list[Any]) -> list[Any]:
    """The targets that raise for an index out of range: on the CPU, where a look at it costs no sync."""
    return [target for target in found if target.values[0].backend in ("cpp", "torch") and not target.marks]


def poisoning(found: list[Any]) -> list[Any]:
    """The targets that answer an index out of range with NaN."""
    return [target for target in found if target.values[0].backend in ("cuda", "triton")]


def serving(found: list[Any], dtype: torch.dtype) -> list[Any]:
    """The targets that compute in `dtype`."""
    return [target for target in found if target.values[0].serves(dtype)]


ROWS = targets("cpp", "cuda", "triton", "torch")
"""Targets of the operators on rows."""

PRODUCTS = targets("cpp", "triton", "torch")
"""Targets of the attention operators."""


def overloads(operator: str) -> list[Any]:
    """The registered operators of one name that have a kernel here, each with a device, for `opcheck`."""
    named = {"auto": "memkern", "cuda": "memkern_cuda", "triton": "memkern_triton"}
    if backends.INTERPRETING:
        found = [("triton", "cpu", [pytest.mark.interpreter])]
    else:
        found = [("auto", "cpu", [])]
        if torch.cuda.is_available():
            found += [(name, "cuda", [pytest.mark.gpu]) for name in named]
    return [
        pytest.param(
            getattr(getattr(torch.ops, named[name]), operator).default, device, marks=marks, id=f"{name}-{device}"
        )
        for name, device, marks in found
        if not backends.installed(name) and hasattr(getattr(torch.ops, named[name]), operator)
    ]


def with_dtypes(found: list[Any]) -> list[Any]:
    """Each target with each dtype it computes in, as parameters."""
    return [
        pytest.param(*target.values, dtype, marks=target.marks, id=f"{target.id}-{str(dtype).removeprefix('torch.')}")
        for target in found
        for dtype in DTYPES
        if target.values[0].serves(dtype)
    ]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}
"""The same values in other strides."""


def assert_accurate(actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor, *summed: torch.Tensor) -> None:
    """The error against float64 is at most twice that of plain torch at the same dtype, plus one eps.

    The eps is of the largest result, or of the largest of what was `summed`, which may cancel.
    """
    assert actual.dtype == same_dtype.dtype
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    largest = max(float(tensor.abs().max()) for tensor in (exact, *summed) if tensor.numel())
    error = (actual.double() - exact).abs().max()
    assert error <= 2 * (same_dtype.double() - exact).abs().max() + torch.finfo(actual.dtype).eps * largest


INSTRUCTION_SETS = ["default", "avx2", "avx512"]
"""Values of ATEN_CPU_CAPABILITY, which limits torch's kernels and the compiled library's."""

needs_cpp = pytest.mark.skipif(bool(backends.installed("cpp")), reason="needs the compiled CPU library")


def on_instruction_set(capability: str, operator: str, arguments: Sequence[Any], folder: Path) -> torch.Tensor:
    """The output of an operator's compiled CPU part in a process held to an instruction set."""
    given, made = folder / "given.pt", folder / "made.pt"
    torch.save(list(arguments), given)
    code = (
        "import sys, torch; from memkern import ops;"
        f"torch.save(ops.{operator}(*torch.load(sys.argv[1]), backend='cpp'), sys.argv[2])"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", code, given, made], check=True, env=environment)
    return torch.load(made)


def random_plan(batch: int, length: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A source in [0, rows) and a scale that is 0, 1 or between, `[batch, length]` each."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(0, rows, (batch, length), generator=generator, dtype=torch.int32)
    scale = torch.rand(batch, length, generator=generator) * 2 - 1
    kind = torch.randint(0, 3, (batch, length), generator=generator)
    return source, torch.where(kind == 0, 0.0, torch.where(kind == 1, 1.0, scale))
