"""The autoencoder: 32 x 32 pixels to 16 x 16 latents of 4 channels and back."""

from __future__ import annotations

from pathlib import Path

import common
import dataset
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from images import SIZE
from torch import Tensor

STEPS, BATCH, RATE, SEED = 2400, 16, 3e-3, 12
_KL_WEIGHT = 3e-7  # on the sum; 2e-5 stalls the training


def build() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def _loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample(generator)).sample
    reconstruction = F.mse_loss(decoded, images) + 0.1 * F.l1_loss(decoded, images)
    return reconstruction + _KL_WEIGHT * posterior.kl().mean()


def train(folder: Path, steps: int = STEPS) -> None:
    """Train, resumable; the result is the folder `vae`, its scaling factor set."""
    out, checkpoint = folder / "vae", folder / "vae.pt"
    if out.exists():
        return
    generator = common.start(SEED)
    parts = dataset.read(folder)
    scenes, posters = parts["scenes"].images, parts["posters"].images
    images = torch.from_numpy(np.concatenate([scenes, posters]))
    # Posters need more of the capacity than scenes: half of every batch.
    weight = torch.cat([torch.full((len(scenes),), 1 / len(scenes)), torch.full((len(posters),), 1 / len(posters))])

    def batch(count: int) -> Tensor:
        picks = torch.multinomial(weight, count, generator=generator)
        return torch.from_numpy(dataset.as_tensor_range(images[picks].numpy()))

    vae = build()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, weight_decay=1e-4)

    def step(number: int) -> float:
        loss = _loss(vae, batch(BATCH), generator)
        return common.descend(optimizer, loss, common.cosine(number, steps, RATE))

    common.run("autoencoder", checkpoint, steps, generator, {"vae": vae, "optimizer": optimizer}, step)
    with torch.no_grad():
        spread = vae.encode(batch(512)).latent_dist.mode().std().item()
    vae.register_to_config(scaling_factor=round(1 / spread, 4))
    vae.save_pretrained(out)
