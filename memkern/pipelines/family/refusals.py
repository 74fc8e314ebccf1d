"""The pipelines that can be patched, and the reasons why others cannot."""

from __future__ import annotations

import inspect

from diffusers import DiffusionPipeline

from . import outputs
from .encoders import clip_embeddings, slots

SUPPORTED = (
    "pipelines whose context comes from CLIP text encoders: those of Stable Diffusion 1.x and 2.x, SDXL, and the CLIP "
    "part of Stable Diffusion 3"
)
_ARGUMENTS = ("prompt", "do_classifier_free_guidance", "prompt_embeds", "negative_prompt_embeds")


def refusals(pipe: DiffusionPipeline) -> list[str]:
    """The reasons why `pipe` cannot be patched; empty if it can."""
    encode = getattr(pipe, outputs.method(pipe), None)
    known = () if encode is None else inspect.signature(encode).parameters
    encoders = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    present = {name: encoder for name, encoder in encoders.items() if encoder is not None}
    # Stable Diffusion 3 reads CLIP's rows in front of a third encoder's.
    if "prompt_3" in known and "prompt_4" not in known:
        present.pop("text_encoder_3", None)
    parts = inspect.signature(type(pipe).__init__).parameters
    # Other pipelines encode prompts by the same names, and read another result: Stable Cascade its pooled outputs.
    reads_context = "unet" in parts or ("prompt_3" in known and "transformer" in parts)
    reasons = [
        f"its {name} is a {type(encoder).__name__}, not a CLIP text model"
        for name, encoder in present.items()
        if clip_embeddings(encoder) is None
    ]
    if not present:
        reasons.append("it has no text_encoder")
    missing = [slot.tokenizer for slot in slots(pipe) if getattr(pipe, slot.tokenizer, None) is None]
    if missing or not (present or getattr(pipe, "tokenizer", None)):
        reasons.append(f"it has no {', '.join(missing) or 'tokenizer'}")
    if encode is not None and not reads_context:
        reasons.append("its encode_prompt returns pooled outputs, or others in other places, and no UNet reads them")
    if encode is None:
        reasons.append("it has no encode_prompt")
    elif absent := [name for name in _ARGUMENTS if name not in known]:
        reasons.append(f"its {outputs.method(pipe)} has no {', '.join(absent)}")
    return reasons


def require_pipeline(pipe: object) -> DiffusionPipeline:
    """`pipe`, or a TypeError if it is not a diffusers pipeline."""
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}")
    return pipe


def require(pipe: object) -> None:
    """Raise TypeError if `pipe` is not a diffusers pipeline, ValueError with the reasons if it is refused."""
    reasons = refusals(require_pipeline(pipe))
    if reasons:
        raise ValueError(
            f"pipe: {type(pipe).__name__} cannot be patched: {'; '.join(reasons)}. Supported are {SUPPORTED}"
        )


def require_kv(pipe: object, policy: object, reasons: list[str]) -> None:
    """Raise ValueError with the `reasons` why keys and values of the pipeline's UNet cannot be edited."""
    if reasons:
        raise ValueError(
            f"policy '{policy}' edits keys and values, and those of this {type(pipe).__name__} cannot be: "
            f"{'; '.join(reasons)}. A policy that edits embeddings, such as 'zero-pad:0.7', needs no UNet"
        )
