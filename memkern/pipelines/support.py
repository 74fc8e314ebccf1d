"""Which pipelines can be patched, and why others cannot."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import DiffusionPipeline
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from ..ledger import Stage
from ..policy import Policy
from .encoding import Vocabulary
from .text_encoder import clip_embeddings

SUPPORTED = "Stable Diffusion pipelines with one CLIP text encoder, such as StableDiffusionPipeline (SD 1.x, 2.x)"
_ARGUMENTS = ("prompt", "do_classifier_free_guidance", "prompt_embeds", "negative_prompt_embeds")


def refusals(pipe: DiffusionPipeline) -> list[str]:
    """Why `pipe` cannot be patched; empty if it can."""
    reasons = []
    encoder = getattr(pipe, "text_encoder", None)
    if clip_embeddings(encoder) is None:
        reasons.append(
            "it has no text_encoder"
            if encoder is None
            else f"its text_encoder is a {type(encoder).__name__}, not a CLIP text model"
        )
    if getattr(pipe, "tokenizer", None) is None:
        reasons.append("it has no tokenizer")
    reasons += [
        f"it has a second text encoder, {name}"
        for name in ("text_encoder_2", "text_encoder_3")
        if getattr(pipe, name, None) is not None
    ]
    encode = getattr(pipe, "encode_prompt", None)
    if encode is None:
        reasons.append("it has no encode_prompt")
    else:
        known = inspect.signature(encode).parameters
        missing = [name for name in _ARGUMENTS if name not in known]
        if missing:
            reasons.append(f"its encode_prompt has no {', '.join(missing)}")
    return reasons


def require(pipe: object) -> None:
    """Raise TypeError if `pipe` is not a diffusers pipeline, ValueError with the reasons if it is refused."""
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}")
    reasons = refusals(pipe)
    if reasons:
        raise ValueError(
            f"pipe: {type(pipe).__name__} cannot be patched: {'; '.join(reasons)}. Supported are {SUPPORTED}"
        )


def embeddings_of(pipe: Any) -> CLIPTextEmbeddings:
    """The embedding layer of the pipeline's CLIP text encoder."""
    embeddings = clip_embeddings(pipe.text_encoder)
    assert embeddings is not None, "require() was not called"
    return embeddings


def vocabulary(pipe: Any) -> Vocabulary:
    """The ids of the pipeline's tokenizer."""
    tokenizer = pipe.tokenizer
    positions = embeddings_of(pipe).position_embedding.num_embeddings
    return Vocabulary(tokenizer.eos_token_id, tokenizer.pad_token_id, positions)


def token_id(pipe: Any, policy: Policy, token: str | None) -> int | None:
    """The id of a token that `policy` pads with; None for none, which leaves the padding alone."""
    if token is None:
        return None
    found = pipe.tokenizer.convert_tokens_to_ids(token)
    if found is None or (found == pipe.tokenizer.unk_token_id and token != pipe.tokenizer.unk_token):
        raise ValueError(
            f"policy '{policy}': the tokenizer has no token {token!r} to pad with; it has {len(pipe.tokenizer)} tokens"
        )
    return int(found)


def stage(policy: Policy, asked: str) -> Stage:
    """Where `policy` is applied: on the embeddings if that can express it, unless asked otherwise."""
    reasons = policy.kv_reasons()
    if asked == "auto":
        return "kv" if reasons else "embeds"
    if asked == "embeds" and reasons:
        raise ValueError(f"stage: policy '{policy}' needs the kv stage, not 'embeds': {'; '.join(reasons)}")
    if asked not in ("embeds", "kv"):
        raise ValueError(f"stage: expected 'auto', 'embeds' or 'kv', got {asked!r}")
    return "kv" if asked == "kv" else "embeds"


def require_kv(pipe: object, policy: Policy, reasons: list[str]) -> None:
    """Raise ValueError with the `reasons` why keys and values of the pipeline's UNet cannot be edited."""
    if reasons:
        raise ValueError(
            f"policy '{policy}' edits keys and values, and those of this {type(pipe).__name__} cannot be: "
            f"{'; '.join(reasons)}. A policy that edits embeddings, such as 'zero-pad:0.7', needs no UNet"
        )
