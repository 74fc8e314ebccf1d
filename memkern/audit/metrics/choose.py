"""The metrics of an audit: those whose weights were given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .clip import PromptAlignment
from .diversity import Diversity
from .metric import Metric
from .pixels import PixelSimilarity
from .sscd import CopyDetection


@dataclass(frozen=True)
class Weights:
    """The paths of the weights of the metrics; a metric whose path is None is skipped, with a note.

    Attributes:
        sscd: TorchScript (".pt") or ONNX (".onnx").
        sscd_size: 288 or 320; by default 320 for a file named "large", as "sscd_disc_large", else 288.
        clip: a CLIP model, a folder or hub name, or "open_clip:ARCHITECTURE/WEIGHTS".
        aesthetic: a linear head on that model's embedding of images.
        lpips: torchvision's AlexNet.
    """

    sscd: Path | None = None
    sscd_size: int | None = None
    clip: str | None = None
    aesthetic: Path | None = None
    lpips: Path | None = None


def metrics(weights: Weights, device: str) -> tuple[list[Metric], list[str]]:
    """The metrics with weights, and for each without them a line that says how to get them.

    Raises:
        FileNotFoundError, ValueError: weights that are missing, or of another kind.
    """
    found: list[Metric] = [PixelSimilarity()]
    missing = []
    if weights.sscd is not None:
        found.append(CopyDetection(weights.sscd, weights.sscd_size, device))
    elif weights.sscd_size is not None:
        raise ValueError("sscd_size: a size needs weights; give sscd as well")
    else:
        missing.append(
            "SSCD: download sscd_disc_mixup.torchscript.pt (facebookresearch/sscd-copy-detection), --sscd PATH"
        )
    if weights.clip is not None:
        found.append(PromptAlignment(weights.clip, weights.aesthetic, device))
    elif weights.aesthetic is not None:
        raise ValueError("aesthetic: the head needs a CLIP model's embedding; give clip as well")
    else:
        missing.append("CLIP score: --clip openai/clip-vit-large-patch14, or a folder with such a model")
    if weights.aesthetic is None:
        missing.append("aesthetic score: --aesthetic sa_0_4_vit_l_14_linear.pth (LAION-AI/aesthetic-predictor)")
    if weights.lpips is not None:
        found.append(Diversity(weights.lpips, device))
    else:
        missing.append("LPIPS diversity: pip install memkern[audit], --lpips alexnet-owt-7be5be79.pth (torchvision)")
    return found, missing
