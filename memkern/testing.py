"""Tiny Stable Diffusion pipelines of real parts with random weights, and a UNet alone, for tests and benchmarks."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .pipelines.attention.measured import Chooser
from .pipelines.session import Session, Settings, Tally
from .pipelines.unet.site import Site
from .policy import Policy
from .roles import CONTEXT_LENGTH

SOT, EOT = "<|startoftext|>", "<|endoftext|>"


class SiteHolder:
    """Stands for the patch of a pipeline whose policy edits nothing: memkern computes the cross-attention of `module`
    while the holder lives.

    Attributes:
        site: memkern's attachment to the module.
        session: the record of its layers, and the data that is kept of the contexts that they read.
    """

    def __init__(self, module: Any) -> None:
        self.in_force, self.tally, self.family = Settings(Policy()), Tally(), self
        self.chooser = Chooser.from_environment()
        self.session = Session(self.in_force, self, self)  # type: ignore[arg-type]
        self.site = Site.of(module)
        self.site.hold(self, processors=True)

    def direct(self) -> Session:
        """The session of direct calls of the module."""
        return self.session

    @property
    def contexts(self) -> Any:
        """The contexts that are kept."""
        return self.session.kept.get(self.site, ())


def clip_tokenizer(tokens: Iterable[str], merges: Iterable[str], *, pad_token: str = EOT) -> CLIPTokenizer:
    """A CLIP tokenizer whose ids are the order of `tokens`, with SOT and EOT last.

    Args:
        tokens: the vocabulary without SOT and EOT; CLIP's begins with "!".
        merges: BPE merges, "left right" each.
        pad_token: EOT as in SD 1.x, or "!" as in SD 2.x.
    """
    vocabulary = {token: index for index, token in enumerate([*tokens, SOT, EOT])}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT_LENGTH, pad_token=pad_token)


def byte_letters() -> list[str]:
    """The letter that stands for each of the 256 bytes, in CLIP's order: printable ones first, so that "!" is 0."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]


def train_tokenizer(texts: Iterable[str], *, size: int = 1024, pad_token: str = EOT) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's layout, learned from `texts`; spare tokens fill it up to `size`."""
    letters = byte_letters()
    bytes_twice = letters + [letter + "</w>" for letter in letters]
    most = size - len(bytes_twice) - 2
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            # The alphabet counts as well, so the size is more than enough.
            vocab_size=len(bytes_twice) + 2 * most,
            end_of_word_suffix="</w>",
            initial_alphabet=letters,
            show_progress=False,
        ),
    )
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]][:most]
    words = list(dict.fromkeys([*bytes_twice, *("".join(merge) for merge in merges)]))
    spares = [f"<|spare{index}|>" for index in range(size - 2 - len(words))]
    return clip_tokenizer(words + spares, [" ".join(merge) for merge in merges], pad_token=pad_token)


def tiny_pipeline(tokenizer: CLIPTokenizer, *, seed: int = 0, width: int = 32, **parts: Any) -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` with two-layer parts and weights drawn from `seed`, on the CPU in float32.

    Args:
        tokenizer: sets the vocabulary of the text encoder.
        width: of the text encoder, and so of the context.
        parts: components to use instead of the tiny ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components: dict[str, Any] = {
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=width,
                    intermediate_size=2 * width,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    max_position_embeddings=CONTEXT_LENGTH,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ).eval(),
            "unet": UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=width,
                attention_head_dim=8,
                norm_num_groups=8,
            ).eval(),
            "vae": AutoencoderKL(
                block_out_channels=(16, 32),
                down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
                up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
                latent_channels=4,
                norm_num_groups=8,
                sample_size=16,
            ).eval(),
            "scheduler": DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
        }
    pipe = StableDiffusionPipeline(
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **{**components, **parts},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
