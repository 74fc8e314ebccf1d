"""A second pipeline with the same weights, to patch and to measure in place of the user's own."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any

import torch

from ..pipelines.family import outputs
from ..pipelines.instance import family_of
from ..pipelines.unet.layers import unwrapped

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def twin(pipe: Any) -> Any:
    """A pipeline with its own modules around the same parameters and buffers as `pipe`, and nothing of memkern.

    Adapters, hooks and processors of others are copied, and the scheduler too; compiled modules become eager ones.
    Patches and calls of the twin do not change `pipe`.

    Raises:
        ValueError: its modules are offloaded, or its `encode_prompt` is a function that belongs to `pipe` only.
    """
    family = family_of(pipe)
    made: Any = object.__new__(type(pipe) if family is None else family.base)
    parts = dict(vars(pipe))
    name = outputs.method(pipe)
    own = parts.pop(name, None if family is None else family.own)
    if own is not None:
        if getattr(own, "__self__", None) is not pipe:
            raise ValueError(f"pipe: its {name} was replaced by {own!r}, which a copy cannot have; remove it first")
        parts[name] = types.MethodType(own.__func__, made)
    modules = {part: unwrapped(module) for part, module in parts.items() if isinstance(module, torch.nn.Module)}
    shared: dict[int, Any] = {}
    for part, module in modules.items():
        if _is_offloaded(module):
            raise ValueError(
                f"pipe: its {part} is offloaded, so the time of a step would include moving weights; load the "
                "pipeline without offloading"
            )
        shared |= {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        shared |= {id(hook): hook for *_, hook in _hooks_of_ours(module)}
    copies = {part: copy.deepcopy(module, shared) for part, module in modules.items()}
    for part, module in modules.items():
        inner = dict(copies[part].named_modules())
        for where, hooks, key, _ in _hooks_of_ours(module):
            del getattr(inner[where], hooks)[key]
    vars(made).update(parts | copies | {"scheduler": copy.deepcopy(pipe.scheduler)})
    made.set_progress_bar_config(disable=True)
    return made


def is_compiled(module: Any) -> bool:
    """True if a module, or a part of it, is compiled."""
    inner = unwrapped(module)
    return inner is not module or any(part._compiled_call_impl is not None for part in inner.modules())


def _hooks_of_ours(module: torch.nn.Module) -> Iterator[tuple[str, str, int, Any]]:
    """memkern's hooks in a module: for each the name of its part, its attribute, its key, and the hook."""
    for name, part in module.named_modules():
        for hooks in _HOOKS:
            for key, hook in getattr(part, hooks).items():
                if str(getattr(hook, "__module__", "")).startswith("memkern."):
                    yield name, hooks, key, hook


def _is_offloaded(module: torch.nn.Module) -> bool:
    """True if hooks of accelerate or diffusers move its weights from call to call."""
    for part in module.modules():
        hook, registry = getattr(part, "_hf_hook", None), getattr(part, "_diffusers_hook", None)
        if getattr(hook, "offload", False) or type(hook).__name__ == "CpuOffload":
            return True
        if any("group_offload" in name for name in getattr(registry, "hooks", ())):
            return True
    return False
