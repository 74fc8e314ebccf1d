"""The weights of a cross-attention layer: whether they can be read, and whether they are still the same.

Weights are read only where calling the module does nothing else. Everything else (LoRA, quantization, offload,
hooks) keeps being called, or the layer is left to its own processor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SAMPLES = 32
"""Values of a weight that are compared with what they were."""


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


def weight_refusals(attn: Any) -> list[str]:
    """Why the weights of the layer's projections cannot be read in place of calling them; empty if they can."""
    reasons = []
    for name, module in (("", attn), *projections(attn)):
        if name and type(module) is not nn.Linear:
            reasons.append(f"{name} is a {type(module).__name__}")
        elif (
            module._forward_hooks
            or not all(getattr(hook, "reads_only", False) for hook in module._forward_pre_hooks.values())
            or "forward" in vars(module)
            or hasattr(module, "_hf_hook")
            or hasattr(module, "_diffusers_hook")
        ):
            reasons.append(f"{name or 'the layer'} has hooks")
        elif name and module.weight.is_inference():
            reasons.append(f"{name}'s weight does not count its changes: it was made in inference mode")
    return reasons


def projections(attn: Any) -> tuple[tuple[str, nn.Module], ...]:
    """The four projections by name."""
    return (("to_q", attn.to_q), ("to_k", attn.to_k), ("to_v", attn.to_v), ("to_out[0]", attn.to_out[0]))


class Weights:
    """The weights that something was computed from, so that a change of any is noticed.

    A weight is the same if it is the same tensor with the same version, memory and dtype. An edit through
    `weight.data` counts no version: on the CPU a sample of the values is compared, which a dense update changes.
    """

    def __init__(self, attn: Any) -> None:
        self._seen = [self._state(tensor) for tensor in self._tensors(attn)]

    def unchanged(self, attn: Any) -> bool:
        """Whether the layer's weights are still those."""
        tensors = self._tensors(attn)
        return len(tensors) == len(self._seen) and all(
            tensor is seen[0] and self._same(self._state(tensor), seen)
            for tensor, seen in zip(tensors, self._seen, strict=True)
        )

    @staticmethod
    def _tensors(attn: Any) -> list[torch.Tensor]:
        modules: list[Any] = [module for _, module in projections(attn)]
        return [tensor for module in modules for tensor in (module.weight, module.bias) if tensor is not None]

    @staticmethod
    def _state(tensor: torch.Tensor) -> tuple[Any, ...]:
        sample = None
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            values = tensor.detach().view(-1)
            sample = values[:: max(1, len(values) // SAMPLES)].clone()
        return tensor, tensor._version, tensor.data_ptr(), tensor.dtype, sample

    @staticmethod
    def _same(now: tuple[Any, ...], seen: tuple[Any, ...]) -> bool:
        return now[1:4] == seen[1:4] and (now[4] is None or torch.equal(now[4], seen[4]))
