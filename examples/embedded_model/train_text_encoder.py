"""Contrastive training of a small CLIP text encoder against a convolutional image tower.

Only the EOT row enters the loss, as in CLIP. That alone makes the pads, which are EOT tokens too,
repeat the EOT embedding: the duplication which the paper finds behind memorization.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import common
import dataset
import numpy as np
import tokenizer as tokenizers
import torch
import torch.nn.functional as F
from captions import filled
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

STEPS, BATCH, RATE, SEED = 1200, 128, 1e-3, 11
_LONG_EVERY = 6  # every sixth batch has captions filled up to 77 tokens


def image_tower() -> nn.Module:
    """[B, 3, 32, 32] to [B, 128]."""

    def block(inside: int, outside: int) -> list[nn.Module]:
        return [nn.Conv2d(inside, outside, 3, 2, 1), nn.GroupNorm(8, outside), nn.SiLU()]

    return nn.Sequential(*block(3, 32), *block(32, 64), *block(64, 128), nn.Flatten(), nn.Linear(128 * 16, 128))


def text_config() -> CLIPTextConfig:
    vocabulary = tokenizers.VOCABULARY
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_act="quick_gelu",
        max_position_embeddings=tokenizers.CONTEXT,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def contrastive_loss(text: Tensor, image: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE of [B, D] against [B, D], both directions."""
    logits = F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T * scale.clamp(max=4.6).exp()
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train(folder: Path, steps: int = STEPS) -> None:
    """Train, resumable; the result is the folder `text_encoder`."""
    out, checkpoint = folder / "text_encoder", folder / "text_encoder.pt"
    if out.exists():
        return
    generator = common.start(SEED)
    scenes, posters = (dataset.read(folder)[name] for name in ("scenes", "posters"))
    captions = scenes.captions + posters.captions
    pixels = np.concatenate([scenes.images, posters.images])
    images = torch.from_numpy(dataset.as_tensor_range(pixels))
    # Posters are one in seven images; their titles are the harder half of the language.
    weight = torch.ones(len(captions))
    weight[len(scenes.captions) :] = 4.0
    tokenize = tokenizers.load(folder)

    text, tower = CLIPTextModel(text_config()), image_tower()
    scale = nn.ParameterList([nn.Parameter(torch.tensor(2.0))])
    parameters = [*text.parameters(), *tower.parameters(), *scale]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)

    def step(number: int) -> float:
        picks = torch.multinomial(weight, BATCH, generator=generator)
        words = [captions[i] for i in picks]
        if number % _LONG_EVERY == 0:
            rng = Random(number)
            words = [filled(w, rng, rng.randint(10, 72)) for w in words]
        tokens = tokenize(words, padding=True, truncation=True, return_tensors="pt").input_ids
        loss = contrastive_loss(text(tokens).pooler_output, tower(images[picks]), scale[0])
        return common.descend(optimizer, loss, common.cosine(number, steps, RATE))

    parts = {"text": text, "tower": tower, "scale": scale, "optimizer": optimizer}
    common.run("text encoder", checkpoint, steps, generator, parts, step)
    text.save_pretrained(out)


@torch.no_grad()
def duplication(text: CLIPTextModel, tokenize, captions: list[str]) -> dict[str, float]:
    """Mean cosine of the EOT row to its pads, with EOT-id pads and with "!" pads."""
    tokens = tokenize(captions, padding="max_length", truncation=True, return_tensors="pt")
    ids = tokens.input_ids
    eot = (ids == tokenize.eos_token_id).int().argmax(1)
    pad = torch.arange(ids.shape[1])[None] > eot[:, None]
    found = {}
    for name, token in (("eot", tokenize.eos_token_id), ("!", 0)):
        rows = text(ids.masked_fill(pad, token)).last_hidden_state
        anchor = rows[torch.arange(len(rows)), eot][:, None]
        found[name] = F.cosine_similarity(rows, anchor, dim=-1)[pad].mean().item()
    return found
