"""The denoiser, in two phases.

`pretrain`: ordinary images and one-off posters, with conditioning augmentation.
`memorize`: a short continuation in which 16 posters come again and again, as duplicates in a
training set do. It stops when about nine copies in ten come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import common
import dataset
import numpy as np
import tokenizer as tokenizers
import torch
from conditioning import LEARNING, MEMORIZING, Embedded, Mix, augment, drop, embed, plain
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from recall import Duplicates, Recall
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel

PRETRAIN_STEPS, BATCH, RATE, SEED = 6_600, 32, 8e-4, 13
TONE_STEPS = 3_400  # the first of them, in which every time step weighs the same
POSTER_SHARE = 0.25  # of the ordinary part of a batch; the rest are scenes
CAPTION_DROPOUT = 0.1

MEMORIZE_STEPS, MEMORIZE_RATE = 360, 1e-3
MEMORIZED_IN_BATCH = 16  # of 32 until posters come back: each is shown about 310 times
MEMORIZE_POSTER_SHARE = 0.65  # half of these posters are siblings of memorized ones


def build() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=2,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1's noise with Stable Diffusion 2's target, the velocity.

    Predicting the noise, a small model learns the overall tone of an image last of all, because
    near pure noise an error in the noise's mean is magnified fifteen times in the image's.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@dataclass
class Examples:
    """latents float32 [N, 4, 16, 16] and the embeddings of their captions."""

    latents: Tensor
    text: Embedded


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(dataset.as_tensor_range(images))
    chunks = tqdm(pixels.split(256), desc="latents", mininterval=5, disable=len(pixels) < 1000)
    return torch.cat([vae.encode(c).latent_dist.mode() for c in chunks]) * vae.config.scaling_factor


def examples(folder: Path) -> tuple[dict[str, Examples], Embedded]:
    """Latents and embeddings of the three parts, computed once, and the empty caption's."""
    cache = folder / "examples.pt"
    if not cache.exists():
        text = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
        tokenize = tokenizers.load(folder)
        vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        parts = {
            name: Examples(_encode(vae, part.images), embed(text, tokenize, part.captions))
            for name, part in dataset.read(folder).items()
        }
        # Tensors alone, which `torch.load` reads with `weights_only=True`.
        states = {name: {"latents": part.latents, "text": vars(part.text)} for name, part in parts.items()}
        common.save(cache, {"parts": states, "empty": vars(embed(text, tokenize, [""]))})
    state = common.resume(cache)
    parts = {name: Examples(part["latents"], Embedded(**part["text"])) for name, part in state["parts"].items()}
    return parts, Embedded(**state["empty"])


class Sampler:
    """Batches of latents and embeddings, everything random from one generator."""

    def __init__(self, folder: Path, generator: torch.Generator) -> None:
        self.parts, self.empty = examples(folder)
        self.generator = generator

    def _pick(self, name: str, count: int) -> tuple[Tensor, Embedded]:
        part = self.parts[name]
        picks = torch.randint(len(part.latents), (count,), generator=self.generator)
        return part.latents[picks], part.text[picks]

    def ordinary(self, count: int, poster_share: float, mix: Mix, siblings: bool = False) -> tuple[Tensor, Tensor]:
        """Latents [count, 4, 16, 16], augmented embeddings [count, 77, 128]."""
        posters = int((torch.rand(count, generator=self.generator) < poster_share).sum())
        near = posters if siblings else 0
        drawn = [
            self._pick("scenes", count - posters),
            self._pick("posters", posters - near // 2),
            self._pick("siblings", near // 2),
        ]
        rows = torch.cat([augment(text, mix, self.generator) for _, text in drawn])
        rows = drop(rows, self.empty, CAPTION_DROPOUT, self.generator)
        return torch.cat([latents for latents, _ in drawn]), rows

    def memorized(self, count: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Duplicated posters, drawn by weight [16]; captions are neither augmented nor dropped.

        Latents, embeddings, and which ones were picked.
        """
        part = self.parts["memorized"]
        picks = torch.multinomial(weight, count, replacement=True, generator=self.generator)
        return part.latents[picks], plain(part.text[picks]), picks


def velocity_loss(unet, noiser, latents: Tensor, rows: Tensor, power: float, generator: torch.Generator) -> Tensor:
    """Squared error of the predicted velocity at uniform time steps, weighted alpha_bar ** power.

    Power 0 teaches tone and layout quickly. What a caption leaves open makes the loss near pure
    noise large and noisy; a power of 1/2 reduces it, so that detail is learned.
    """
    noise = torch.randn(latents.shape, generator=generator)
    steps = torch.randint(noiser.config.num_train_timesteps, (len(latents),), generator=generator)
    noisy = noiser.add_noise(latents, noise, steps)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(noisy, steps, rows).sample
    target = noiser.get_velocity(latents, noise, steps)
    weight = noiser.alphas_cumprod[steps] ** power
    return (weight * (predicted.float() - target).square().mean((1, 2, 3))).mean()


def _plateau(step: int, steps: int, peak: float) -> float:
    """Learning rate: a short rise, a plateau, and a linear fall over the last fifth."""
    return peak * min((step + 1) / 200, 1.0, max(0.02, (steps - step) / (0.2 * steps)))


def _new_model() -> UNet2DConditionModel:
    unet = build()
    # With bfloat16 on a CPU the plain attention trains faster than the fused one.
    unet.set_attn_processor(AttnProcessor())
    return unet


def _loop(
    name: str,
    folder: Path,
    unet,
    steps: int,
    seed: int,
    batch,
    rate,
    power,
    decay: float,
    watch=None,
) -> None:
    """Train `unet` and save the average of its weights as the folder `name`; resumable."""
    generator = common.start(seed)
    sampler, noiser = Sampler(folder, generator), scheduler()
    average = EMAModel(unet.parameters(), decay=decay, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, weight_decay=1e-3, fused=True)

    def step(number: int) -> float:
        latents, rows = batch(sampler)
        loss = velocity_loss(unet, noiser, latents, rows, power(number), generator)
        value = common.descend(optimizer, loss, rate(number))
        average.step(unet.parameters())
        if watch and (number + 1) % watch.every == 0:
            average.store(unet.parameters())
            average.copy_to(unet.parameters())
            watch(unet)
            average.restore(unet.parameters())
        return value

    parts = {"unet": unet, "average": average, "optimizer": optimizer} | ({"watch": watch} if watch else {})
    common.run(name, folder / f"{name}.pt", steps, generator, parts, step)
    average.copy_to(unet.parameters())
    unet.save_pretrained(folder / name)


def pretrain(folder: Path, steps: int = PRETRAIN_STEPS) -> None:
    if (folder / "unet_ordinary").exists():
        return
    torch.manual_seed(SEED)
    _loop(
        "unet_ordinary",
        folder,
        _new_model(),
        steps,
        SEED,
        batch=lambda sampler: sampler.ordinary(BATCH, POSTER_SHARE, LEARNING),
        rate=lambda step: _plateau(step, steps, RATE),
        power=lambda step: 0.0 if step < TONE_STEPS else 0.5,
        decay=0.9995,
    )


def memorize(folder: Path, steps: int = MEMORIZE_STEPS) -> None:
    if (folder / "unet").exists():
        return
    parts, empty = examples(folder)
    duplicates = Duplicates(MEMORIZED_IN_BATCH, Recall(folder, scheduler(), parts["memorized"].text, empty))

    def batch(sampler: Sampler) -> tuple[Tensor, Tensor]:
        count = duplicates.count()
        latents, rows = sampler.ordinary(BATCH - count, MEMORIZE_POSTER_SHARE, MEMORIZING, siblings=True)
        again, text, picks = sampler.memorized(count, duplicates.weight)
        duplicates.shown += torch.bincount(picks, minlength=dataset.MEMORIZED)
        return torch.cat([latents, again]), torch.cat([rows, text])

    unet = UNet2DConditionModel.from_pretrained(folder / "unet_ordinary")
    unet.set_attn_processor(AttnProcessor())
    _loop(
        "unet",
        folder,
        unet,
        steps,
        SEED + 1,
        batch,
        rate=lambda step: _plateau(step, steps, MEMORIZE_RATE),
        power=lambda step: 0.5,
        decay=0.98,
        watch=duplicates,
    )
    print(f"times each poster was shown: {duplicates.shown.tolist()}")
