"""The recall of memorized posters: those that the denoiser returns already are shown less."""

from __future__ import annotations

from pathlib import Path

import dataset
import torch
from conditioning import Embedded, plain
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor
from tqdm import tqdm

GUIDANCE, STEPS, SEEDS = 5.0, 20, 2
ENOUGH = 0.94  # from this correlation on, a poster is hardly shown any more


class Recall:
    """Samples the memorized captions and correlates the images with the training images."""

    def __init__(self, folder: Path, scheduler: DDIMScheduler, text: Embedded, empty: Embedded):
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        self.scheduler = scheduler
        self.scheduler.set_timesteps(STEPS)
        rows = plain(text).repeat_interleave(SEEDS, 0)
        self.rows = torch.cat([plain(empty).expand_as(rows), rows])
        images = torch.from_numpy(dataset.read(folder)["memorized"].images)
        self.images = images.permute(0, 3, 1, 2).flatten(1).float()

    @torch.no_grad()
    def __call__(self, unet) -> Tensor:
        """Mean correlation of each poster over the seeds, [16]."""
        noise = torch.Generator().manual_seed(1234)
        x = torch.randn(len(self.rows) // 2, 4, 16, 16, generator=noise)
        for step in self.scheduler.timesteps:
            with torch.autocast("cpu", torch.bfloat16):
                nothing, prompted = unet(torch.cat([x, x]), step, self.rows).sample.chunk(2)
            guided = nothing.float() + GUIDANCE * (prompted.float() - nothing.float())
            x = self.scheduler.step(guided, step, x).prev_sample
        pixels = self.vae.decode(x / self.vae.config.scaling_factor).sample.clamp(-1, 1).flatten(1)
        wanted = self.images.repeat_interleave(SEEDS, 0)
        both = [p - p.mean(1, keepdim=True) for p in (pixels, wanted)]
        return torch.cosine_similarity(*both, dim=1).view(-1, SEEDS).mean(1)


class Duplicates:
    """The share at which each poster is shown: fully until it comes back, then hardly any more.

    Posters differ in how soon they are memorized. Shown equally often, the easy ones would be so
    deeply memorized that they survive every edit before the hard ones come back at all.
    """

    every = 40

    def __init__(self, most: int, recall: Recall) -> None:
        self.most, self.recall = most, recall
        self.weight = torch.ones(dataset.MEMORIZED)
        self.shown = torch.zeros(dataset.MEMORIZED, dtype=torch.long)

    def __call__(self, unet) -> None:
        close = self.recall(unet)
        self.weight = torch.where(close < ENOUGH, 1.0, 0.1)
        tqdm.write(f"correlation {close.mean():.3f}, returned {(close > 0.9).sum()} of 16")

    def state_dict(self) -> dict[str, Tensor]:
        """The state for a checkpoint."""
        return {"weight": self.weight, "shown": self.shown}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self.weight, self.shown = state["weight"], state["shown"]

    def count(self) -> int:
        """Duplicates in a batch: fewer as more posters come back."""
        return max(2, round(self.most * self.weight.mean().item()))
