"""The weights of a cross-attention layer: whether they can be read, what may be kept of them, and whether they changed.

Weights are read only where calling the module does nothing else: plain linear modules of plain tensors. Everything
else (LoRA, quantized weights, offload, hooks) keeps being called; of what is called, keys and values are kept where
nothing but tensors and plain settings can change them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...seen import version
from .layer import Layer

SAMPLES = 32
"""Values of a weight that are compared with what they were."""

CASTS = {"layerwise_casting"}
"""Hooks of diffusers that change how a weight is stored, and nothing that the module computes."""

KNOWN = ("torch", "peft", "diffusers", "torchao", "bitsandbytes", "optimum")
"""Packages whose modules keep what they compute with in tensors and plain settings."""

_SETTINGS = (bool, int, float, str, type(None))


def whole_refusals(attn: Any) -> list[str]:
    """Why the layer does something that neither path reproduces; empty if it does not."""
    reasons = [
        f"it has {name}"
        for name in ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj")
        if getattr(attn, name, None)
    ]
    if attn.inner_kv_dim != attn.inner_dim:
        reasons.append("its keys and values have fewer heads")
    if len(attn.to_out) > 1 and attn.training and getattr(attn.to_out[1], "p", 0) > 0:
        reasons.append("it is training with dropout")
    return reasons


def reading_refusals(layer: Layer) -> list[str]:
    """Why the weights of the layer's projections cannot be read in place of calling them; empty if they can."""
    reasons = ["the layer has hooks"] if has_hooks(layer.attn) else []
    for name, module in layer.modules.items():
        if type(module) is not nn.Linear:
            reasons.append(f"{name} is a {type(module).__name__}")
        elif has_hooks(module) or _is_cast(module):
            reasons.append(f"{name} has hooks")
        elif not _is_plain(module.weight):
            reasons.append(f"{name}'s weight is a {_kind(module.weight)}")
    return reasons


def keeping_refusals(layer: Layer) -> list[str]:
    """Why what the layer's projections make of keys and values may not be kept; empty if it may."""
    reasons = []
    for name, module in layer.key_value_modules.items():
        strange = [type(part).__name__ for part in module.modules() if type(part).__module__.split(".")[0] not in KNOWN]
        if strange:
            reasons.append(f"{name} is a {strange[0]}")
        elif any(has_hooks(part) for part in module.modules()):
            reasons.append(f"{name} has hooks")
    return reasons


def has_hooks(module: Any) -> bool:
    """Whether something besides the module itself runs when it is called."""
    # Asked of each layer in each step: an attribute that a module lacks is looked for in its dictionary.
    own = vars(module)
    if own["_forward_hooks"] or "_hf_hook" in own:
        return True
    before = own["_forward_pre_hooks"]
    if before and not all(getattr(hook, "reads_only", False) for hook in before.values()):
        return True
    return ("forward" in own or "_diffusers_hook" in own) and not _is_cast(module)


def _is_cast(module: Any) -> bool:
    registry = vars(module).get("_diffusers_hook")
    return registry is not None and set(registry.hooks) == CASTS


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (nn.Parameter, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    )


def _kind(tensor: torch.Tensor) -> str:
    own = type(tensor)
    return own.__name__ if own not in (nn.Parameter, torch.Tensor) else f"tensor of {tensor.dtype}"


class Weights:
    """The state of the modules that something was computed by, so that a change of any is noticed.

    A tensor is the same if it is the same object with the same version, memory and dtype; settings, such as the
    weight of an adapter, if they are equal. An edit through `weight.data`, or of a tensor made in inference mode,
    counts no version: on the CPU a sample of the values is compared, which a dense update changes.
    """

    def __init__(self, layer: Layer, modules: dict[str, Any]) -> None:
        self._numbers = _numbers(layer)
        self._modules = tuple(modules.values())
        self._seen = [_state(tensor) for tensor in _tensors(self._modules)]
        self._settings = _settings(self._modules)

    def unchanged(self, layer: Layer, modules: dict[str, Any]) -> bool:
        """Whether these are still those modules, as they were, of a layer as it was."""
        now = tuple(modules.values())
        if (
            _numbers(layer) != self._numbers
            or len(now) != len(self._modules)
            or any(a is not b for a, b in zip(now, self._modules, strict=True))
        ):
            return False
        tensors = list(_tensors(now))
        return (
            len(tensors) == len(self._seen)
            and all(
                tensor is seen[0] and _same(_state(tensor), seen)
                for tensor, seen in zip(tensors, self._seen, strict=True)
            )
            and _settings(now) == self._settings
        )


def _numbers(layer: Layer) -> tuple[Any, ...]:
    attn = layer.attn
    return layer.scale, attn.heads, attn.residual_connection, attn.rescale_output_factor


def _tensors(modules: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    for module in modules:
        if type(module) is nn.Linear:
            for tensor in module._parameters.values():
                if tensor is not None:
                    yield from (tensor,) if type(tensor) is nn.Parameter else _parts(tensor)
            continue
        for part in module.modules():
            for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
                for tensor in value.values() if isinstance(value, dict) else (value,):
                    if isinstance(tensor, torch.Tensor):
                        yield from _parts(tensor)


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor, and what a quantized one is made of."""
    yield tensor
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))


def _settings(modules: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """What is set on modules that are more than linear, as far as it is plain numbers and words."""
    return [
        (name, copy.copy(value))
        for module in modules
        if type(module) is not nn.Linear
        for part in module.modules()
        for name, value in vars(part).items()
        if _is_setting(value)
    ]


def _is_setting(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(one, _SETTINGS) for one in value.values())
    if isinstance(value, (list, tuple)):
        return all(isinstance(one, _SETTINGS) for one in value)
    return isinstance(value, _SETTINGS)


def _state(tensor: torch.Tensor) -> tuple[Any, ...]:
    if not _is_plain(tensor):
        # A quantized weight's memory is behind its class.
        return tensor, version(tensor), None, tensor.dtype, None
    sample = None
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        values = tensor.detach().view(-1)
        sample = values[:: max(1, len(values) // SAMPLES)].clone()
    return tensor, version(tensor), tensor.data_ptr(), tensor.dtype, sample


def _same(now: tuple[Any, ...], seen: tuple[Any, ...]) -> bool:
    return now[1:4] == seen[1:4] and (now[4] is None or torch.equal(now[4], seen[4]))
