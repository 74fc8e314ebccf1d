"""Timing the layers of a pipeline beforehand, so that no image waits for it: `memkern tune`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from .coalesce import Keys, coalesce_plan
from .pipelines.attention import choose
from .pipelines.attention.layer import Layer
from .pipelines.attention.measured import Chooser, rounded
from .pipelines.attention.paths import compute_dtype
from .pipelines.attention.rows import Rows
from .pipelines.attention.sources import Readers, Source
from .pipelines.attention.weights import keeping_refusals, reading_refusals, whole_refusals
from .pipelines.unet.layers import is_known, layers_of, roots
from .pipelines.unet.processor import former_of
from .plan import lower
from .policy import Policy
from .roles import CONTEXT_LENGTH, Role
from .timings import OFF, Table, cache_folder, table

MOST_TOKENS = CONTEXT_LENGTH - 2


@dataclass(frozen=True)
class _Met:
    """A layer as it is in a call of its UNet: N, C, and the context's shape."""

    layer: Layer
    queries: int
    width: int
    length: int
    context_width: int
    dtype: torch.dtype
    device: torch.device


@torch.no_grad()
def tune(
    pipe: Any, sizes: Sequence[tuple[int, int] | None] = (None,), images: Sequence[int] = (1,),
    policies: Sequence[Policy] = (), *, guidance: bool = True, backend: str = "auto",
) -> tuple[list[choose.Choice], Table]:  # fmt: skip
    """Time the layers of a pipeline, for prompts of every length, and keep the times for later processes.

    Args:
        pipe: a text-to-image pipeline, patched or not.
        sizes: height and width of images; None for the model's own.
        images: numbers of images per call.
        policies: they decide how many keys are left; the default is that of `memkern.patch`.
        guidance: True if each image has a negative prompt besides its prompt.
        backend: of the operators.

    Returns:
        The choice for each shape of layer, and the table that keeps it.

    Raises:
        ValueError: MEMKERN_CACHE or MEMKERN_CHOICE forbid to keep or look up times, or there are no images.
    """
    folder = cache_folder()
    if folder is None:
        raise ValueError(f"MEMKERN_CACHE: {OFF} keeps nothing; expected a folder")
    if not Chooser.from_environment().measures:
        raise ValueError("MEMKERN_CHOICE: estimated looks nothing up; expected measured")
    if min(images, default=0) < 1:
        raise ValueError(f"images: expected 1 or more, got {list(images)}")
    chooser = Chooser(True, math.inf, folder, again=True)
    batches = list(_batches(policies or [Policy.parse("swap-pad-zero-eot")], images, guidance))
    found: dict[object, choose.Choice] = {}
    todo = [(met, readers) for size in sizes for met in _met(pipe, size) for readers in batches]
    for met, readers in tqdm(todo, desc="layers", disable=None):
        processor = type(met.layer.own), reading_refusals(met.layer) == []
        key = met.queries, met.width, met.layer.attn.heads, met.dtype, processor, rounded(readers, met.length)
        if key not in found:
            choice = _choice(met, readers, backend, chooser)
            if choice is not None:
                found[key] = choice
    return list(found.values()), table(folder, pipe.device)


def _choice(met: _Met, readers: Readers, backend: str, chooser: Chooser) -> choose.Choice | None:
    """The choice of a layer for these numbers of keys; None if there is nothing to choose."""
    layer = met.layer
    x = torch.empty((), dtype=met.dtype, device=met.device).expand(
        sum(rows for _, rows in readers), met.queries, met.width
    )
    if whole_refusals(layer.attn) or choose.without_kernels(x, compute_dtype(x), backend):
        return None
    none = torch.empty(0, dtype=torch.int64, device=met.device)
    counts, rows = tuple(count for count, _ in readers), Rows.repeated([rows for _, rows in readers])
    source = Source(rows, Keys(none, none, counts), met.length, Layer.key_value)
    unreadable, unkept = bool(reading_refusals(layer)), bool(keeping_refusals(layer))
    times = choose.compare(layer, x, source, met.context_width, backend, chooser, unreadable, unkept)
    return choose.Choice(choose.fastest(times), source.counts, (met.queries, met.width, layer.attn.heads), times)


def _batches(policies: Sequence[Policy], images: Sequence[int], guidance: bool) -> Iterator[Readers]:
    """The keys that are left of a batch's sequences, for prompts of every length; equal ones once."""
    seen = set()
    empty = _roles(0)
    for policy in policies:
        for tokens in range(MOST_TOKENS + 1):
            cond = _roles(tokens)
            plans = [lower(policy, cond, "cond", cond_roles=cond, context_length=CONTEXT_LENGTH)]
            if guidance:
                plans.append(lower(policy, empty, "uncond", cond_roles=cond, context_length=CONTEXT_LENGTH))
                if not tokens and plans[0].equals(plans[1]):
                    plans.pop()  # both read the same keys
            rows = 1 + guidance - (len(plans) - 1)
            for count in images:
                readers = [(left, rows * count) for plan in plans for left in coalesce_plan(plan).counts]
                shape = rounded(readers, CONTEXT_LENGTH)
                if shape not in seen:
                    seen.add(shape)
                    yield shape


def _roles(tokens: int) -> torch.Tensor:
    """Roles uint8 `[1, L]` of a prompt of `tokens` tokens."""
    roles = [Role.SOT, *[Role.PROMPT] * tokens, Role.EOT, *[Role.PAD] * (MOST_TOKENS - tokens)]
    return torch.tensor([roles], dtype=torch.uint8, device="cpu")


def _met(pipe: Any, size: tuple[int, int] | None) -> list[_Met]:
    """The cross-attention layers as they are in one step of one image."""
    found: list[_Met] = []

    def hook(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        context = context[0] if isinstance(context, tuple) else context
        if isinstance(context, torch.Tensor):
            layer = Layer(attn, former_of(attn.processor))
            found.append(_Met(layer, x.shape[1], x.shape[2], context.shape[1], context.shape[2], x.dtype, x.device))

    layers = [attn for _, attn in layers_of(roots(pipe, controlnet=True)) if is_known(attn)]
    handles = [attn.register_forward_pre_hook(hook, with_kwargs=True) for attn in layers]
    asked = {} if size is None else {"height": size[0], "width": size[1]}
    try:
        pipe("a", num_inference_steps=1, guidance_scale=1.0, output_type="latent", **asked)
    finally:
        for handle in handles:
            handle.remove()
    return found
