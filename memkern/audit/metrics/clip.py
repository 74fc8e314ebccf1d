"""CLIP scores, and the aesthetic score that is linear in CLIP's embedding of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .metric import Shown, state_dict

OPEN_CLIP = "open_clip:"

Images = Callable[[Sequence[Image.Image]], torch.Tensor]
Texts = Callable[[Sequence[str]], torch.Tensor]


class PromptAlignment:
    """CLIP score: cosine similarity of the image with the original prompt, and with the text that a method made of it.

    With a linear head also the aesthetic score of Schuhmann et al. (LAION-Aesthetics): head · embedding + bias.

    Args:
        model: a CLIP model of transformers, a folder or hub name, or "open_clip:ARCHITECTURE/WEIGHTS", a tag or file.
        head: a file with "weight" `[1, D]` and "bias" `[1]`, or None.
        device: the device that it runs on.
    """

    def __init__(self, model: str, head: Path | None, device: str) -> None:
        self.images, self.texts = _open_clip(model, device) if model.startswith(OPEN_CLIP) else _clip(model, device)
        self.head = None if head is None else _head(head)
        self.columns: tuple[str, ...] = ("clip_score", "clip_score_changed")
        self.described: dict[str, Any] = {"clip": model}
        if head is not None:
            self.columns += ("aesthetic",)
            self.described["aesthetic"] = head.name

    @torch.no_grad()
    def __call__(self, batch: Sequence[Shown]) -> list[tuple[float | None, ...]]:
        """See `Metric`."""
        images = self.images([shown.image for shown in batch]).float().cpu()
        normed = torch.nn.functional.normalize(images, dim=-1)
        given = [shown.prompt for shown in batch] + [shown.text or "" for shown in batch]
        texts = torch.nn.functional.normalize(self.texts(given).float().cpu(), dim=-1)
        original, changed = ((normed * half).sum(-1).tolist() for half in texts.chunk(2))
        found: list[tuple[float | None, ...]] = [
            (own, other if shown.text is not None else None)
            for shown, own, other in zip(batch, original, changed, strict=True)
        ]
        if self.head is None:
            return found
        weight, bias = self.head
        if weight.shape[1] != normed.shape[1]:
            raise ValueError(
                f"aesthetic: the head is of {weight.shape[1]} numbers, the CLIP model's embedding has {normed.shape[1]}"
            )
        scores = (normed @ weight.T + bias)[:, 0].tolist()
        return [(*row, score) for row, score in zip(found, scores, strict=True)]


def _clip(model: str, device: str) -> tuple[Images, Texts]:
    from transformers import CLIPModel, CLIPProcessor

    try:
        clip = CLIPModel.from_pretrained(model).to(device).eval()
        processor = CLIPProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"clip: {model} is no CLIP model of transformers that can be loaded: {reason}") from error

    def images(batch: Sequence[Image.Image]) -> torch.Tensor:
        given = processor(images=list(batch), return_tensors="pt").to(device)
        found: torch.Tensor = clip.visual_projection(clip.vision_model(**given).pooler_output)
        return found

    def texts(given: Sequence[str]) -> torch.Tensor:
        ids = processor(text=list(given), return_tensors="pt", padding=True, truncation=True).to(device)
        found: torch.Tensor = clip.text_projection(clip.text_model(**ids).pooler_output)
        return found

    return images, texts


def _open_clip(model: str, device: str) -> tuple[Images, Texts]:
    architecture, slash, weights = model.removeprefix(OPEN_CLIP).partition("/")
    if not (architecture and slash and weights):
        raise ValueError(
            f"clip: expected open_clip:ARCHITECTURE/WEIGHTS, such as open_clip:ViT-L-14/openai, got {model!r}"
        )
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(f"clip: {model} needs open_clip: pip install open_clip_torch ({error})") from None
    clip, _, prepared = open_clip.create_model_and_transforms(architecture, pretrained=weights, device=device)
    clip.eval()
    tokenized = open_clip.get_tokenizer(architecture)

    def images(batch: Sequence[Image.Image]) -> torch.Tensor:
        found: torch.Tensor = clip.encode_image(torch.stack([prepared(image) for image in batch]).to(device))
        return found

    def texts(given: Sequence[str]) -> torch.Tensor:
        found: torch.Tensor = clip.encode_text(tokenized(list(given)).to(device))
        return found

    return images, texts


def _head(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    state = state_dict("aesthetic", path)
    weight, bias = state.get("weight"), state.get("bias")
    if weight is None or bias is None or weight.ndim != 2 or weight.shape[0] != 1 or bias.shape != (1,):
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        raise ValueError(f'aesthetic: {path}: expected "weight" [1, D] and "bias" [1], got {shapes}')
    return weight.float(), bias.float()
