"""The result of a pipeline's method for encoding prompts: the part of each branch."""

from __future__ import annotations

from typing import Any

import torch

from ...policy import BRANCHES, Branch
from .encoders import Slot

CONCATENATED: dict[str, tuple[Branch, ...]] = {
    "StableDiffusionInstructPix2PixPipeline": ("cond", "uncond", "uncond"),
}
"""Classes whose method returns all rows in one tensor, and the branches in the order of its equal parts."""


def order(pipe: object) -> tuple[Branch, ...]:
    """The branches of the equal parts of a UNet's batch, for classes where that is not uncond before cond."""
    return CONCATENATED.get(type(pipe).__name__, ())


def method(pipe: object) -> str:
    """The name of the method that encodes prompts."""
    return "_encode_prompt" if type(pipe).__name__ in CONCATENATED else "encode_prompt"


def split(pipe: object, outputs: Any, guided: bool) -> dict[Branch, torch.Tensor]:
    """The embeddings `[B·n, L, D]` of each branch in the result of the method."""
    if not isinstance(outputs, torch.Tensor):
        return {branch: outputs[index] for index, branch in enumerate(BRANCHES) if branch == "cond" or guided}
    if not guided:
        return {"cond": outputs}
    order = CONCATENATED[type(pipe).__name__]
    # Later parts of a branch are copies of its first one.
    return dict(reversed([*zip(order, outputs.chunk(len(order)), strict=True)]))


def join(pipe: object, outputs: Any, parts: dict[Branch, torch.Tensor]) -> Any:
    """The result of the method, with other embeddings."""
    if not isinstance(outputs, torch.Tensor):
        results = list(outputs)
        for index, branch in enumerate(BRANCHES):
            results[index] = parts.get(branch, results[index])
        return tuple(results)
    if len(parts) == 1:
        return parts["cond"]
    return torch.cat([parts[branch] for branch in CONCATENATED[type(pipe).__name__]])


def encoded_branches(pipe: Any, arguments: dict[str, Any]) -> tuple[list[Branch], list[Branch]]:
    """The branches that a call makes embeddings for, and those for which it calls the text encoders.

    Args:
        arguments: of the call, by name.
    """
    used: list[Branch] = [branch for branch in BRANCHES if branch == "cond" or arguments["do_classifier_free_guidance"]]
    given = {"cond": arguments["prompt_embeds"], "uncond": arguments["negative_prompt_embeds"]}
    encoded = [branch for branch in used if given[branch] is None]
    if zeroed_negatives(pipe, arguments) and "uncond" in encoded:
        encoded.remove("uncond")
    return used, encoded


def zeroed_negatives(pipe: Any, arguments: dict[str, Any]) -> bool:
    """True if the negative embeddings are all zero rather than those of an empty prompt, as SDXL's are."""
    forced = getattr(pipe.config, "force_zeros_for_empty_prompt", False)
    return bool(forced) and arguments.get("negative_prompt") is None and arguments["negative_prompt_embeds"] is None


def columns(pipe: Any, slots: tuple[Slot, ...], width: int) -> list[slice]:
    """The columns of a context of this width that each encoder made.

    Raises:
        ValueError: the context is narrower than these columns.
    """
    found, start = [], 0
    for slot in slots:
        found.append(slice(start, start + slot.width(pipe)))
        start = found[-1].stop
    if start > width:
        raise ValueError(f"embeds: expected at least the {start} columns of the text encoders, got {width}")
    return found
