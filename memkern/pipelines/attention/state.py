"""The state of the weights that a result was computed from, to see if they have changed since."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...seen import version
from .layer import Layer
from .weights import has_hooks, is_plain, keeping_refusals, reading_refusals

SAMPLES = 32
"""The number of a weight's values that are compared with their former ones."""

_SETTINGS = (bool, int, float, str, type(None))


class Weights:
    """The modules of a layer that computed a result, as they were then.

    A tensor is the same if it is the same object with the same version, memory and dtype; settings, such as the
    weight of an adapter, if they are equal. An edit through `weight.data`, or of a tensor made in inference mode, does
    not change the version: on the CPU a sample of the values is compared where that is asked for, or where there is no
    version at all; a dense update changes the sample.

    Args:
        is_read: whether all weights were read; if not, only K and V were computed, by calling their modules.
    """

    def __init__(self, layer: Layer, *, is_read: bool) -> None:
        self._is_read = is_read
        modules = layer.modules if is_read else layer.key_value_modules
        self._modules = tuple(modules.values())
        self._places = tuple(_places(layer, modules))
        self._numbers = _numbers(layer.attn)
        self._linear = all(_is_linear(module) for module in self._modules)
        if self._linear:
            self._parameters = [
                (module._parameters, name, None if tensor is None else _Tensor(tensor))
                for module in self._modules
                for name, tensor in module._parameters.items()
            ]
        else:
            self._tensors = [_Tensor(tensor) for tensor in _tensors(self._modules)]
            self._settings = _settings(self._modules)

    def unchanged(self, layer: Layer, *, by_value: bool) -> bool:
        """True if the layer still has these modules, as they were, and nothing else runs when they are called.

        Args:
            by_value: whether values are compared even where torch counts versions.
        """
        # Runs for each layer in each step: the usual case makes no call that is not needed.
        attn = layer.attn
        if _numbers(attn) != self._numbers:
            return False
        for held, name, module in self._places:
            if held.get(name) is not module:
                return False
        if not self._linear:
            return not self._refusals(layer) and self._same(by_value)
        if self._is_read and has_hooks(attn):
            return False
        for module in self._modules:
            if type(module) is not nn.Linear or has_hooks(module) or "_diffusers_hook" in vars(module):
                return False
        for parameters, name, seen in self._parameters:
            tensor = parameters.get(name)
            if (tensor is not None) if seen is None else not seen.is_still(tensor, by_value):
                return False
        return True

    def _refusals(self, layer: Layer) -> list[str]:
        return reading_refusals(layer) if self._is_read else keeping_refusals(layer)

    def _same(self, by_value: bool) -> bool:
        tensors = list(_tensors(self._modules))
        return (
            len(tensors) == len(self._tensors)
            and all(seen.is_still(now, by_value) for seen, now in zip(self._tensors, tensors, strict=True))
            and _settings(self._modules) == self._settings
        )


class _Tensor:
    """One tensor, as it was."""

    __slots__ = ("_dtype", "_place", "_sample", "_tensor", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version, self._dtype = tensor, version(tensor), tensor.dtype
        # A quantized weight's memory is behind its class.
        self._place = tensor.data_ptr() if is_plain(tensor) else None
        self._sample = _sample(tensor)

    def is_still(self, now: torch.Tensor | None, by_value: bool) -> bool:
        """True if it is `now`, unwritten since."""
        if now is not self._tensor or now.dtype != self._dtype:
            return False
        if self._place is not None and now.data_ptr() != self._place:
            return False
        if self._version is None:
            by_value = True
        elif now._version != self._version:
            return False
        if not by_value or self._sample is None:
            return True
        sample = _sample(now)
        return sample is not None and torch.equal(sample, self._sample)


def _sample(tensor: torch.Tensor) -> torch.Tensor | None:
    if not is_plain(tensor) or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    values = tensor.detach().view(-1)
    return values[:: max(1, len(values) // SAMPLES)].clone()


def _is_linear(module: Any) -> bool:
    """True if a module is only a linear one, of plain tensors."""
    return (
        type(module) is nn.Linear
        and not has_hooks(module)
        and "_diffusers_hook" not in vars(module)
        and all(tensor is None or is_plain(tensor) for tensor in module._parameters.values())
    )


def _places(layer: Layer, modules: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The places of the layer's modules: a dictionary, a name in it, and the module."""
    outs = layer.attn.to_out
    for name, module in modules.items():
        if name == "to_out[0]":
            yield layer.attn._modules, "to_out", outs
            yield outs._modules, "0", module
        else:
            yield layer.attn._modules, name, module


def _numbers(attn: Any) -> tuple[Any, ...]:
    own = vars(attn)
    return own["scale"], own["heads"], own["inner_dim"], own["residual_connection"], own["rescale_output_factor"]


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
    """A tensor, and the parts of a quantized one."""
    yield tensor
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))


def _settings(modules: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """The settings of modules that are more than linear, as far as they are plain numbers and strings."""
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
