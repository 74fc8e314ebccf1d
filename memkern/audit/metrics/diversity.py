"""The distance between images of one prompt over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .metric import Shown, pixels_of, state_dict

SIZE = 256


class Diversity:
    """LPIPS distance (Zhang et al., 2018; AlexNet, at 256) to the images of the same prompt by other seeds, a mean.

    Args:
        weights: of torchvision's AlexNet ("alexnet-owt-7be5be79.pth"); the package `lpips` has its own heads.
        device: the device that it runs on.
    """

    columns: tuple[str, ...] = ("lpips_diversity",)

    def __init__(self, weights: Path, device: str) -> None:
        state = state_dict("lpips", weights)
        try:
            import lpips
        except ImportError as error:
            raise ValueError(f"lpips: needs the package lpips: pip install memkern[audit] ({error})") from None
        # Random weights avoid a download; the file's weights replace them.
        distance = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        wanted = {name: f"features.{name.partition('.')[2]}" for name in distance.net.state_dict()}
        missing = [name for name in wanted.values() if name not in state]
        if missing:
            raise ValueError(f"lpips: {weights}: expected AlexNet's weights, {missing[0]!r} is not among them")
        distance.net.load_state_dict({name: state[other] for name, other in wanted.items()})
        self.distance = distance.to(device).eval()
        self.device = device
        self.described: dict[str, Any] = {"lpips": weights.name, "lpips_size": SIZE}

    @torch.no_grad()
    def __call__(self, batch: Sequence[Shown]) -> list[tuple[float | None, ...]]:
        """See `Metric`."""
        found: list[tuple[float | None, ...]] = []
        for shown in batch:
            if not shown.siblings:
                found.append((None,))
                continue
            images = pixels_of([shown.image, *shown.siblings], SIZE, (0.5,) * 3, (0.5,) * 3).to(self.device)
            found.append((float(self.distance(images[:1].expand_as(images[1:]), images[1:]).mean()),))
        return found
