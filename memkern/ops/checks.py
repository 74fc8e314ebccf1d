"""Argument checks shared by the operators' public functions; a message says what was expected and what was given."""

from __future__ import annotations

import torch

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(
    name: str,
    tensor: object,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """Raise TypeError or ValueError unless `tensor` is a tensor of this shape, dtype and device.

    Args:
        shape: sizes to match; a letter stands for any size.
        device: None accepts any.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {_spell(shape)}, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {allowed}, got {tensor.dtype}")
    matches = tensor.dim() == len(shape) and all(
        isinstance(size, str) or size == actual for size, actual in zip(shape, tensor.shape, strict=True)
    )
    if not matches:
        raise ValueError(f"{name}: expected shape {_spell(shape)}, got {list(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def _spell(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def check_constant(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError if a tensor of a plan requires a gradient: it is a constant of the edit."""
    if tensor.requires_grad:
        raise ValueError(f"{name}: no gradient is defined for it; pass {name}.detach()")
