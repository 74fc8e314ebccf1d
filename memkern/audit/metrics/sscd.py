"""SSCD, the descriptor with which papers on memorization measure copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import check_file
from .metric import Shown, pixels_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = (288, 320)


class CopyDetection:
    """Cosine similarity of SSCD descriptors (Pizzi et al., 2022) to two kinds of images.

    `sscd_to_unmitigated` compares with the model's own unmitigated image of the same seed, as Kim & No do;
    `sscd_to_reference` with the training image, as Wen et al., MemBench and GUARD do. The two are not comparable.
    """

    columns: tuple[str, ...] = ("sscd_to_unmitigated", "sscd_to_reference")

    def __init__(self, weights: Path, size: int | None, device: str) -> None:
        if size is not None and size not in SIZES:
            raise ValueError(f"sscd_size: expected {' or '.join(map(str, SIZES))}, got {size}")
        check_file("sscd", weights)
        self.describe = _onnx(weights) if weights.suffix == ".onnx" else _torchscript(weights, device)
        self.size = size or size_of(weights)
        self.described: dict[str, Any] = {"sscd": weights.name, "sscd_size": self.size}

    def __call__(self, batch: Sequence[Shown]) -> list[tuple[float | None, ...]]:
        """See `Metric`."""
        images = [shown.image for shown in batch] + [shown.unmitigated for shown in batch]
        images += [shown.reference for shown in batch if shown.reference is not None]
        described = torch.nn.functional.normalize(self.describe(pixels_of(images, self.size, MEAN, STD)), dim=-1)
        own, unmitigated, references = torch.split(described, [len(batch), len(batch), len(images) - 2 * len(batch)])
        left = iter(references)
        return [
            (float(mine @ theirs), None if shown.reference is None else float(mine @ next(left)))
            for shown, mine, theirs in zip(batch, own, unmitigated, strict=True)
        ]


def size_of(weights: Path) -> int:
    """The side that images are resized to, by the file's name: 320 for "sscd_disc_large", else 288."""
    return SIZES[1] if "large" in weights.name else SIZES[0]


def _torchscript(weights: Path, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    try:
        model: Any = torch.jit.load(str(weights), map_location=device).eval()  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"sscd: {weights} is no TorchScript model; expected a file such as sscd_disc_mixup.torchscript.pt"
        ) from None

    @torch.no_grad()
    def describe(pixels: torch.Tensor) -> torch.Tensor:
        described: torch.Tensor = model(pixels.to(device)).float().cpu()
        return described

    return describe


def _onnx(weights: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("sscd: an .onnx file needs onnxruntime: pip install memkern[audit]") from None
    try:
        session = onnxruntime.InferenceSession(str(weights))
    except Exception:  # onnxruntime's own, one for each way in which a file is wrong
        raise ValueError(f"sscd: {weights} is no ONNX model") from None
    name = session.get_inputs()[0].name
    return lambda pixels: torch.from_numpy(session.run(None, {name: pixels.numpy()})[0])
