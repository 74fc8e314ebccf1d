"""What an audit measures on pictures: one class per metric behind one protocol, batched, on any device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ..demo.judge import correlation

SSCD_MEAN, SSCD_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Shown:
    """A picture and what it may be compared with.

    Attributes:
        image: RGB.
        prompt: the original prompt, whatever a method made of it.
        unmitigated: the unpatched pipeline's picture of the same prompt and seed.
        reference: the training image, if one is known.
        siblings: the pictures of the same prompt and method by other seeds.
    """

    image: Image.Image
    prompt: str
    unmitigated: Image.Image
    reference: Image.Image | None
    siblings: tuple[Image.Image, ...] = ()


class Metric(Protocol):
    """A measure of pictures."""

    columns: tuple[str, ...]
    """The columns of the results that it fills."""

    def __call__(self, batch: Sequence[Shown]) -> list[tuple[float | None, ...]]:
        """For each picture a value per column; None where there is nothing to compare with."""


class PixelSimilarity:
    """Pearson correlation of pixels: tells copies in the same place, and needs no weights."""

    columns: tuple[str, ...] = ("pixels_to_unmitigated", "pixels_to_reference")

    def __call__(self, batch: Sequence[Shown]) -> list[tuple[float | None, ...]]:
        """See `Metric`."""
        return [(_pixels(shown.image, shown.unmitigated), _pixels(shown.image, shown.reference)) for shown in batch]


class CopyDetection:
    """Cosine similarity of SSCD descriptors (Pizzi et al., 2022), under its two meanings.

    `sscd_to_unmitigated` compares with the model's own unmitigated picture of the same seed, as Kim & No do;
    `sscd_to_reference` with the training image, as Wen et al., MemBench and GUARD do. The two are not comparable.
    """

    columns: tuple[str, ...] = ("sscd_to_unmitigated", "sscd_to_reference")

    def __init__(self, weights: Path, device: str) -> None:
        self.describe = _onnx(weights) if weights.suffix == ".onnx" else _torchscript(weights, device)

    def __call__(self, batch: Sequence[Shown]) -> list[tuple[float | None, ...]]:
        """See `Metric`."""
        pictures = [shown.image for shown in batch] + [shown.unmitigated for shown in batch]
        pictures += [shown.reference for shown in batch if shown.reference is not None]
        described = torch.nn.functional.normalize(self.describe(_pixels_of(pictures, 288)), dim=-1)
        own, unmitigated, references = torch.split(described, [len(batch), len(batch), len(pictures) - 2 * len(batch)])
        left = iter(references)
        return [
            (float(mine @ theirs), None if shown.reference is None else float(mine @ next(left)))
            for shown, mine, theirs in zip(batch, own, unmitigated, strict=True)
        ]


class PromptAlignment:
    """CLIP score: cosine similarity of the picture and the original prompt."""

    columns: tuple[str, ...] = ("clip_score",)

    def __init__(self, model: str, device: str) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.model = CLIPModel.from_pretrained(model).to(device).eval()
        self.processor = CLIPProcessor.from_pretrained(model)
        self.device = device

    @torch.no_grad()
    def __call__(self, batch: Sequence[Shown]) -> list[tuple[float | None, ...]]:
        """See `Metric`."""
        given = self.processor(
            text=[shown.prompt for shown in batch],
            images=[shown.image for shown in batch],
            return_tensors="pt",
            padding=True,
            truncation=True,
        ).to(self.device)
        out = self.model(**given)
        images, texts = (torch.nn.functional.normalize(x, dim=-1) for x in (out.image_embeds, out.text_embeds))
        return [(float(score),) for score in (images * texts).sum(-1)]


class Diversity:
    """LPIPS distance to the pictures of the same prompt by other seeds, a mean."""

    columns: tuple[str, ...] = ("lpips_diversity",)

    def __init__(self, device: str) -> None:
        import lpips

        self.distance = lpips.LPIPS(net="alex", verbose=False).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, batch: Sequence[Shown]) -> list[tuple[float | None, ...]]:
        """See `Metric`."""
        found: list[tuple[float | None, ...]] = []
        for shown in batch:
            if not shown.siblings:
                found.append((None,))
                continue
            pictures = _pixels_of([shown.image, *shown.siblings], 256, mean=(0.5,) * 3, std=(0.5,) * 3).to(self.device)
            found.append((float(self.distance(pictures[:1].expand_as(pictures[1:]), pictures[1:]).mean()),))
        return found


def metrics(*, sscd: Path | None, clip: str | None, device: str) -> tuple[list[Metric], list[str]]:
    """The metrics that can be had, and for each that cannot a line that says how to get it.

    Args:
        sscd: weights of SSCD, TorchScript (".pt") or ONNX (".onnx").
        clip: a CLIP model, a folder or hub name.
        device: where they run.

    Raises:
        FileNotFoundError, ValueError: weights that are not there, or of another kind.
    """
    found: list[Metric] = [PixelSimilarity()]
    missing = []
    if sscd is not None:
        found.append(CopyDetection(sscd, device))
    else:
        missing.append(
            "SSCD: download sscd_disc_mixup.torchscript.pt (facebookresearch/sscd-copy-detection), --sscd PATH"
        )
    if clip is not None:
        found.append(PromptAlignment(clip, device))
    else:
        missing.append("CLIP score: --clip openai/clip-vit-large-patch14, or a folder with such a model")
    if importlib.util.find_spec("lpips") is not None:
        found.append(Diversity(device))
    else:
        missing.append("LPIPS diversity: pip install memkern[audit]")
    return found, missing


def _pixels(image: Image.Image, other: Image.Image | None) -> float | None:
    if other is None:
        return None
    return correlation(image, other if other.size == image.size else other.resize(image.size))


def _pixels_of(
    pictures: Sequence[Image.Image],
    size: int,
    mean: tuple[float, ...] = SSCD_MEAN,
    std: tuple[float, ...] = SSCD_STD,
) -> torch.Tensor:
    """Float32 `[B, 3, size, size]`, normalized."""
    resized = [np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR), np.float32) for picture in pictures]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
    shift, scale = (torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1, 1) for values in (mean, std))
    return (pixels - shift) / scale


def _torchscript(weights: Path, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if not weights.is_file():
        raise FileNotFoundError(f"sscd: there is no file {weights}")
    try:
        model: Any = torch.jit.load(str(weights), map_location=device).eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(f"sscd: {weights} is no TorchScript model: {str(error).splitlines()[0]}") from None

    @torch.no_grad()
    def describe(pixels: torch.Tensor) -> torch.Tensor:
        described: torch.Tensor = model(pixels.to(device)).float().cpu()
        return described

    return describe


def _onnx(weights: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    if not weights.is_file():
        raise FileNotFoundError(f"sscd: there is no file {weights}")
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("sscd: an .onnx file needs onnxruntime: pip install memkern[audit]") from None
    session = onnxruntime.InferenceSession(str(weights))
    name = session.get_inputs()[0].name
    return lambda pixels: torch.from_numpy(session.run(None, {name: pixels.numpy()})[0])
