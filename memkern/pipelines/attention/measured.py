"""The times of a layer's paths, measured where a shape is met for the first time.

The timed layer is another one of the same shape, with its own weights and hidden states from its own generator: nothing
of the image is read or written, and no state of random numbers moves. For a layer whose projections are called (LoRA,
quantized, IP-Adapter) it is a plain one: their extra time is the same on every path.
"""

from __future__ import annotations

import copy
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from ...coalesce import MULTIPLE, Keys
from ...ops.backends import tell
from ...timings import Times, cache_folder, table
from .clock import Clock
from .layer import Layer
from .paths import absorbed, compute_dtype, projected
from .rows import Rows
from .sources import Readers, Source

Projections = Literal["read", "called", "anew"]
"""The weights are read; the modules are called, K and V kept; or K and V are computed again at each step."""

SECONDS = 2.0
"""The seconds that a pipeline may spend on timing, unless MEMKERN_CHOICE_SECONDS says otherwise."""

_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Shape:
    """The properties that a layer's time depends on.

    Attributes:
        queries, heads, head_dim, width: N, H, D and C.
        keys: the numbers of keys left, each with the number of rows of the batch that read them, in order.
        length, context_width: of the context.
        dtype: of the hidden states.
        computed: the dtype of products.
        former: the layer's own processor, with the settings that change its speed.
        projections: how they may be used.
        backend: the one that was asked for.
        setting: threads of a CPU, or whether a GPU's float32 is TF32.
    """

    queries: int
    heads: int
    head_dim: int
    width: int
    keys: Readers
    length: int
    context_width: int
    dtype: torch.dtype
    computed: torch.dtype
    former: str
    projections: Projections
    backend: str
    setting: str

    @classmethod
    def of(
        cls, layer: Layer, x: torch.Tensor, source: Source, context_width: int, backend: str, projections: Projections
    ) -> Shape:
        """The shape of a layer with hidden states like x and keys like those of `source`, in numbers rounded up to
        multiples of 8.
        """
        attn = layer.attn
        setting = f"{torch.get_num_threads()} threads"
        if x.is_cuda:
            setting = "TF32" if torch.backends.cuda.matmul.allow_tf32 else ""
        keys, head_dim = rounded(source.readers, source.length), attn.inner_dim // attn.heads
        return cls(
            x.shape[1], attn.heads, head_dim, x.shape[2], keys, source.length, context_width,
            x.dtype, compute_dtype(x), _former(layer), projections, backend, setting,
        )  # fmt: skip

    def __str__(self) -> str:
        keys = "+".join(
            f"{number}x{count}" + (f" for {rows} rows" if rows > 1 else "")
            for (count, rows), number in sorted(Counter(self.keys).items())
        )
        dtypes = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.computed))
        parts = [
            f"{self.queries}x{self.width} by {self.heads} heads of {self.head_dim}",
            f"keys {keys} of {self.length}x{self.context_width}",
            " as ".join(dtypes),
            f"against {self.former}",
            f"projections {self.projections}",
            self.backend,
            self.setting,
        ]
        return ", ".join(part for part in parts if part)


def rounded(readers: Iterable[tuple[int, int]], length: int) -> Readers:
    """The numbers of keys as shapes have them: multiples of 8, but no more than the context has, in order."""
    return tuple(sorted((min(length, max(1, -(-count // MULTIPLE)) * MULTIPLE), rows) for count, rows in readers))


def _former(layer: Layer) -> str:
    own, attn = layer.own, layer.attn
    flags = [name for name in ("upcast_attention", "upcast_softmax") if getattr(attn, name, False)]
    slices = [f"slices of {own.slice_size}"] if hasattr(own, "slice_size") else []
    return " with ".join([_processor(layer)[0].__class__.__name__, *flags, *slices])


def _processor(layer: Layer) -> tuple[Any, bool]:
    """The processor that computes the layer in its former way, and whether K and V are of one projection.

    With images of IP-Adapters the paths differ only in the text's part.
    """
    return (AttnProcessor2_0(), False) if layer.kind == "images" else (layer.own, layer.kind == "fused")


class Chooser:
    """Gives the times of the paths of a pipeline's layers: from the table, else measured while there is time left for
    that, else estimated.

    Args:
        measures: whether anything is timed or looked up.
        seconds: the most that timing may take, all shapes together. The first call of a path on a GPU, which may
            compile kernels, does not count: that is done once on a machine.
        folder: of the tables; None keeps nothing beyond the process.
        again: whether times that another process only estimated are now measured.
    """

    def __init__(
        self, measures: bool, seconds: float = 0.0, folder: Path | None = None, *, again: bool = False
    ) -> None:
        self.measures, self.left, self.folder, self.again = measures, seconds, folder, again

    @classmethod
    def from_environment(cls) -> Chooser:
        """Make the chooser that MEMKERN_CHOICE, MEMKERN_CHOICE_SECONDS and MEMKERN_CACHE ask for.

        Raises:
            ValueError: one of them has a value that is not allowed.
        """
        how, seconds = os.environ.get("MEMKERN_CHOICE", "measured"), os.environ.get("MEMKERN_CHOICE_SECONDS")
        if how not in ("measured", "estimated"):
            raise ValueError(f"MEMKERN_CHOICE: expected measured or estimated, got {how!r}")
        return cls(how == "measured", SECONDS if seconds is None else _seconds(seconds), cache_folder())

    def times(
        self, layer: Layer, x: torch.Tensor, source: Source, context_width: int, backend: str, projections: Projections,
        estimates: Mapping[Any, float],
    ) -> Times:  # fmt: skip
        """The times of a layer's paths, in milliseconds.

        Args:
            x: hidden states `[B, N, C]`, of which only the shape, dtype and device count.
            estimates: those of the open paths.
        """
        estimated = Times(dict(estimates), measured=False)
        if not self.measures or _is_watched():
            return estimated
        shape = Shape.of(layer, x, source, context_width, backend, projections)
        kept, key = table(self.folder, x.device), str(shape)
        # A thread that waits then finds the times of the other.
        with _ONE_AT_A_TIME:
            found = kept.find(key)
            if found is None or (self.again and not found.measured):
                took = self._timed(layer, shape, x.device, list(estimates))
                made = estimated if took is None else Times(took, measured=True)
                found = kept.add(key, made, replace=found is not None)
        return found

    def _timed(self, layer: Layer, shape: Shape, device: torch.device, paths: list[str]) -> dict[str, float] | None:
        """The measured times; None where there was no time left, or timing failed."""
        if self.left <= 0:
            return None
        clock = Clock(device, self.left)
        try:
            with torch.no_grad():
                return clock.compare(calls(layer, shape, device, paths))
        except Exception as error:
            # An image does not fail because timing does.
            tell(("timing", str(shape)), f"no path was timed for {shape}: {type(error).__name__}: {error}")
            return None
        finally:
            self.left -= clock.spent


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ValueError(f"MEMKERN_CHOICE_SECONDS: expected a number of seconds such as {SECONDS:g}, got {text!r}")
    return seconds


def _is_watched() -> bool:
    """True if a mode, or hooks on every module, now watch all computation: to count, trace or fake it."""
    hooked: Callable[[], bool] = getattr(nn.modules.module, "_has_any_global_hook", lambda: False)
    return bool(torch._C._len_torch_dispatch_stack()) or torch.compiler.is_compiling() or hooked()


def calls(
    layer: Layer, shape: Shape, device: torch.device, paths: list[str]
) -> dict[str, Callable[[], torch.Tensor | None]]:
    """A call of each path, for a layer of that shape which stands in for `layer`."""
    draw = _Draw(device)
    stand_in = _stand_in(layer, shape, draw)
    batch = sum(rows for _, rows in shape.keys)
    x = draw(batch, shape.queries, shape.width, dtype=shape.dtype)
    context = draw(batch, shape.length, shape.context_width, dtype=shape.dtype)
    source = _source(shape, device)
    found: dict[str, Callable[[], torch.Tensor | None]] = {}
    for path in paths:
        if path == "former":
            found[path] = lambda: stand_in.own(stand_in.attn, x, encoder_hidden_states=context)
            continue
        if path == "absorbed":
            made = absorbed(stand_in, source, shape.backend, context, shape.computed)
            if made is None:
                continue
            attend = made[0]
        else:
            kept = None if shape.projections == "anew" else context
            attend = projected(stand_in, source, shape.backend, kept, readable=shape.projections == "read")
        found[path] = lambda attend=attend: attend(x, context, None)  # type: ignore[misc]
    return found


class _Draw:
    """Tensors of small random numbers, from a generator of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._generator = device, torch.Generator(device)
        self._generator.manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device).uniform_(-1, 1, generator=self._generator)

    def linear(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
        made = nn.Linear(inputs, outputs, bias=bias, device="meta", dtype=dtype).requires_grad_(False)
        for name, parameter in made.named_parameters():
            values = self(*parameter.shape, dtype=dtype).div_(math.sqrt(inputs))
            setattr(made, name, nn.Parameter(values, requires_grad=False))
        return made


def _stand_in(layer: Layer, shape: Shape, draw: _Draw) -> Layer:
    """A layer with the settings of another, and with plain projections of its own."""
    real, (own, is_fused) = layer.attn, _processor(layer)
    attn = copy.copy(real)
    inner = shape.heads * shape.head_dim

    def linear(inputs: int, outputs: int, like: Any) -> nn.Linear:
        # Autocast keeps the casts of weights, so these already have that dtype.
        return draw.linear(inputs, outputs, getattr(like, "bias", None) is not None, shape.computed)

    parts: dict[str, Any] = {"to_q": linear(shape.width, inner, real.to_q)}
    if is_fused:
        parts["to_kv"] = linear(shape.context_width, 2 * inner, real.to_kv)
    else:
        parts |= {name: linear(shape.context_width, inner, getattr(real, name)) for name in ("to_k", "to_v")}
    out = linear(inner, shape.width, real.to_out[0])
    parts["to_out"] = nn.ModuleList([out, nn.Dropout(0.0)]).eval()
    vars(attn)["_modules"] = {**vars(real)["_modules"], **parts}
    return Layer(attn, own)


def _source(shape: Shape, device: torch.device) -> Source:
    left = tuple(count for count, _ in shape.keys)
    counts = torch.tensor(left, dtype=torch.int64, device=device).unsqueeze(1)
    width = -(-max(left) // MULTIPLE) * MULTIPLE
    position = torch.arange(width, dtype=torch.int64, device=device).expand(len(left), -1)
    bias = torch.zeros(position.shape, dtype=torch.float32, device=device)
    keys = Keys(position.where(position < counts, 0), bias.masked_fill(position >= counts, -math.inf), left)
    rows = Rows.repeated([rows for _, rows in shape.keys])

    def project(layer: Layer, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.key_value(keys.rows(rows.distinct(context)))

    return Source(rows, keys, shape.length, project)
