"""The CLIP text encoders of a pipeline, and the parts of the context that are theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from ...policy import Policy


def clip_embeddings(text_encoder: object) -> CLIPTextEmbeddings | None:
    """The embedding layer of a CLIP text encoder, in both of transformers' layouts; None if it is no CLIP."""
    core = getattr(text_encoder, "text_model", text_encoder)
    embeddings = getattr(core, "embeddings", None)
    return embeddings if isinstance(embeddings, CLIPTextEmbeddings) else None


@dataclass(frozen=True)
class Vocabulary:
    """The ids that matter, read from the tokenizer (a model's config may still carry CLIP's old, wrong ones)."""

    eos_token_id: int
    pad_token_id: int
    context_length: int


@dataclass(frozen=True)
class Slot:
    """A text encoder and its tokenizer, by the names of a pipeline's attributes."""

    encoder: str
    tokenizer: str

    def refusal(self, pipe: Any) -> str | None:
        """The reason why the pipeline's encoder is refused; None if it is not."""
        encoder = getattr(pipe, self.encoder, None)
        if clip_embeddings(encoder) is not None:
            return None
        return f"its {self.encoder} is a {type(encoder).__name__}, not a CLIP text model"

    def embeddings(self, pipe: Any) -> CLIPTextEmbeddings:
        """The encoder's embedding layer.

        Raises:
            ValueError: the encoder is no CLIP text model.
        """
        found = clip_embeddings(getattr(pipe, self.encoder, None))
        if found is None:
            raise ValueError(self.refusal(pipe))
        return found

    def width(self, pipe: Any) -> int:
        """The number of columns of the context that the encoder makes."""
        return int(self.embeddings(pipe).token_embedding.embedding_dim)

    def vocabulary(self, pipe: Any) -> Vocabulary:
        """The ids of the tokenizer."""
        tokenizer = getattr(pipe, self.tokenizer)
        positions = self.embeddings(pipe).position_embedding.num_embeddings
        return Vocabulary(tokenizer.eos_token_id, tokenizer.pad_token_id, positions)

    def token_id(self, pipe: Any, policy: Policy, token: str | None) -> int | None:
        """The id of a token that `policy` pads with; None for none, which leaves the padding alone."""
        if token is None:
            return None
        tokenizer = getattr(pipe, self.tokenizer)
        found = tokenizer.convert_tokens_to_ids(token)
        if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
            raise ValueError(
                f"policy '{policy}': the {self.tokenizer} has no token {token!r} to pad with; "
                f"it has {len(tokenizer)} tokens"
            )
        return int(found)


SLOTS = (Slot("text_encoder", "tokenizer"), Slot("text_encoder_2", "tokenizer_2"))


def slots(pipe: Any) -> tuple[Slot, ...]:
    """The text encoders of the pipeline, in the order of its calls: SDXL has both, its refiner only the second."""
    return tuple(slot for slot in SLOTS if clip_embeddings(getattr(pipe, slot.encoder, None)) is not None)


@dataclass(frozen=True)
class EncoderCall:
    """The input of one text-encoder call.

    Attributes:
        slot: that of the encoder.
        roles: uint8 `[B, L]` on the host.
        swapped: bool `[B, L]`, the positions whose pad id was replaced.
    """

    slot: Slot
    roles: torch.Tensor
    swapped: torch.Tensor


POOLED_ONLY = ("StableDiffusionGLIGENPipeline", "StableDiffusionGLIGENTextImagePipeline")
"""Classes that call a text encoder beside `encode_prompt` for its pooled output, which no pad reaches."""
