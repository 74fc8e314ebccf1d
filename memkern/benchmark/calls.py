"""The arguments that a pipeline passes to its UNet and to its `encode_prompt`, taken from its own call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..pipelines.family import outputs

_STEERED = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call, the same objects."""

    args: tuple[Any, ...]
    named: dict[str, Any]

    def sent(self, function: Callable[..., Any]) -> Any:
        """The result of `function` called with them."""
        return function(*self.args, **self.named)

    @property
    def sample(self) -> torch.Tensor:
        """The latents `[B, C, …, H, W]` of a UNet's arguments."""
        found: torch.Tensor = self.named["sample"] if "sample" in self.named else self.args[0]
        return found

    @property
    def context(self) -> torch.Tensor:
        """The context that the UNet reads, `[B, L, D]`."""
        found: torch.Tensor = self.named["encoder_hidden_states"]
        return found

    def cut(self, side: int) -> Arguments | None:
        """The arguments of a UNet with the `side` × `side` corner of the latents; None if another argument, such as a
        ControlNet's output, has their size.
        """
        if any(self.named.get(name) is not None for name in _STEERED):
            return None
        corner = self.sample[..., :side, :side].contiguous()
        if "sample" in self.named:
            return Arguments(self.args, {**self.named, "sample": corner})
        return Arguments((corner, *self.args[1:]), self.named)


class _Reached(BaseException):
    """The UNet is called, and the rest of the pipeline's call is not needed."""


def first_step(pipe: Any, call: Callable[[], object]) -> Arguments:
    """The arguments of a pipeline's first call of its UNet; the pipeline stops there.

    Args:
        pipe: a pipeline that is not the user's.
        call: a call of it.

    Raises:
        ValueError: it never called its UNet.
    """
    found: list[Arguments] = []

    def look(module: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(Arguments(args, named))
        raise _Reached

    handle = pipe.unet.register_forward_pre_hook(look, prepend=True, with_kwargs=True)
    try:
        call()
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise ValueError(f"pipe: this {type(pipe).__name__} made its image without its UNet")


def first_encoding(pipe: Any, call: Callable[[], object]) -> Arguments:
    """The arguments of a pipeline's call of its `encode_prompt`; otherwise as `first_step`."""
    name, found = outputs.method(pipe), []
    encode, own = getattr(pipe, name), vars(pipe).get(name)

    def look(*args: Any, **named: Any) -> Any:
        found.append(Arguments(args, named))
        return encode(*args, **named)

    vars(pipe)[name] = look
    try:
        first_step(pipe, call)
    finally:
        vars(pipe).pop(name)
        if own is not None:
            vars(pipe)[name] = own
    return found[0]
