"""Tiny pipelines of every family, of real parts with random weights."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from memkern.testing import tiny_pipeline

SIZE = 16
"""Pixels of a side: 8×8 latents."""


def text_encoder(tokenizer, width, kind=CLIPTextModel, layers=2):
    """A CLIP text encoder for a tokenizer."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def unet(context, kind=diffusers.UNet2DConditionModel, **options):
    """A UNet with cross-attention at 8×8, in the middle at 4×4, and at 8×8."""
    given = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": context,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return kind(**{**given, **options}).eval()


def sdxl_parts(tokenizers, pooled=40):
    """The parts of SDXL beside a UNet: two text encoders of width 32 and 40."""
    first, second = tokenizers["sd1"], tokenizers["sd2"]
    return {
        "tokenizer": first,
        "tokenizer_2": second,
        "text_encoder": text_encoder(first, 32),
        "text_encoder_2": text_encoder(second, pooled, CLIPTextModelWithProjection),
    }


def sdxl_unet(context=72, pooled=40, ids=6, **options):
    return unet(
        context,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=pooled + 8 * ids,
        **options,
    )


def controlnet(unet_model):
    """A ControlNet whose zero convolutions are not zero, so that it has an effect."""
    made = diffusers.ControlNetModel.from_unet(unet_model, conditioning_embedding_out_channels=(8, 16)).eval()
    for parameter in (*made.controlnet_down_blocks.parameters(), *made.controlnet_mid_block.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def image(*shape):
    """Pixels in [0, 1]."""
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)).expand(*(shape or (1,)), -1, -1, -1)


def mask():
    made = torch.zeros(1, 1, SIZE, SIZE)
    made[..., : SIZE // 2] = 1
    return made


def build(kind, parts, **given):
    """A pipeline of `kind` from those of `parts` that it takes, and `given`."""
    known = inspect.signature(kind.__init__).parameters
    values = {**{name: part for name, part in parts.items() if name in known}, **given}
    for name, parameter in known.items():
        if name != "self" and name not in values and parameter.default is inspect.Parameter.empty:
            values[name] = None
    if "requires_safety_checker" in known:
        values["requires_safety_checker"] = False
    if "add_watermarker" in known:
        values["add_watermarker"] = False
    pipe = kind(**values)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Family:
    """A pipeline, and how it is called."""

    def __init__(self, name: str, pipe: Any, **options: Any) -> None:
        self.name, self.pipe, self.options = name, pipe, options

    def __call__(self, prompt="a cat", steps=2, **options: Any) -> torch.Tensor:
        given = {"num_inference_steps": steps, "output_type": "latent", **self.options, **options}
        known = inspect.signature(type(self.pipe).__call__).parameters
        if "strength" in known:
            given.setdefault("strength", 0.9)
        for name in ("height", "width"):
            if name in known and "image" not in given:
                given.setdefault(name, SIZE)
        given = {name: value for name, value in given.items() if name in known}
        generator = torch.Generator().manual_seed(0)
        out = self.pipe(prompt, generator=generator, **given)
        return out[0] if isinstance(out[0], torch.Tensor) else torch.as_tensor(out[0])


def _sd(tokenizers):
    pipe = tiny_pipeline(tokenizers["sd1"])
    return {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}


def sd_families(tokenizers) -> dict[str, Any]:
    """Name → a function that builds the family."""
    d = diffusers
    pix2pix = d.StableDiffusionInstructPix2PixPipeline

    def plain(kind, **options):
        return lambda: Family(kind.__name__, build(kind, _sd(tokenizers)), **options)

    def other_unet(kind, channels, **options):
        def make():
            parts = _sd(tokenizers)
            torch.manual_seed(0)
            parts["unet"] = unet(32, in_channels=channels)
            return Family(kind.__name__, build(kind, parts), **options)

        return make

    def with_controlnet(kind, count=1, **options):
        def make():
            parts = _sd(tokenizers)
            torch.manual_seed(0)
            nets = [controlnet(parts["unet"]) for _ in range(count)]
            control = image() if count == 1 else [image()] * count
            named = {"control_image": control, "image": image()} if "control_image" in inspect.signature(
                kind.__call__
            ).parameters else {"image": control}  # fmt: skip
            return Family(
                kind.__name__, build(kind, parts, controlnet=nets if count > 1 else nets[0]), **named, **options
            )

        return make

    def with_adapter():
        parts = _sd(tokenizers)
        torch.manual_seed(0)
        adapter = d.T2IAdapter(
            in_channels=3, channels=(16, 32), num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
        )
        return Family(
            "StableDiffusionAdapterPipeline",
            build(d.StableDiffusionAdapterPipeline, parts, adapter=adapter),
            image=image(),
        )

    def lcm():
        parts = _sd(tokenizers)
        torch.manual_seed(0)
        parts["unet"] = unet(32, time_cond_proj_dim=8)
        parts["scheduler"] = d.LCMScheduler.from_config(parts["scheduler"].config)
        return Family("LatentConsistencyModelPipeline", build(d.LatentConsistencyModelPipeline, parts))

    def animated():
        parts = _sd(tokenizers)
        torch.manual_seed(0)
        adapter = d.MotionAdapter(
            block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=2,
            motion_num_attention_heads=2, motion_max_seq_length=8,
        ).eval()  # fmt: skip
        return Family("AnimateDiffPipeline", build(d.AnimateDiffPipeline, parts, motion_adapter=adapter), num_frames=3)

    def depth():
        parts = _sd(tokenizers)
        torch.manual_seed(0)
        parts["unet"] = unet(32, in_channels=5)
        pipe = build(d.StableDiffusionDepth2ImgPipeline, parts)
        return Family("StableDiffusionDepth2ImgPipeline", pipe, image=image(), depth_map=torch.rand(1, SIZE, SIZE))

    def upscale():
        parts = _sd(tokenizers)
        torch.manual_seed(0)
        parts["unet"] = unet(32, in_channels=7, num_class_embeds=1000)
        pipe = build(d.StableDiffusionUpscalePipeline, parts, low_res_scheduler=d.DDPMScheduler())
        return Family("StableDiffusionUpscalePipeline", pipe, image=image()[..., :8, :8], noise_level=20)

    return {
        "StableDiffusionPipeline": plain(d.StableDiffusionPipeline),
        "StableDiffusionDepth2ImgPipeline": depth,
        "StableDiffusionUpscalePipeline": upscale,
        "StableDiffusionImg2ImgPipeline": plain(d.StableDiffusionImg2ImgPipeline, image=image()),
        "StableDiffusionInpaintPipeline": plain(d.StableDiffusionInpaintPipeline, image=image(), mask_image=mask()),
        "StableDiffusionInstructPix2PixPipeline": other_unet(pix2pix, 8, image=image()),
        "StableDiffusionControlNetPipeline": with_controlnet(d.StableDiffusionControlNetPipeline),
        "StableDiffusionControlNetPipeline, two nets": with_controlnet(d.StableDiffusionControlNetPipeline, 2),
        "StableDiffusionControlNetPipeline, guess mode": with_controlnet(
            d.StableDiffusionControlNetPipeline, guess_mode=True
        ),
        "StableDiffusionControlNetImg2ImgPipeline": with_controlnet(d.StableDiffusionControlNetImg2ImgPipeline),
        "StableDiffusionAdapterPipeline": with_adapter,
        "StableDiffusionPAGPipeline": plain(d.StableDiffusionPAGPipeline, pag_scale=2.0),
        "LatentConsistencyModelPipeline": lcm,
        "AnimateDiffPipeline": animated,
    }


def sdxl_families(tokenizers) -> dict[str, Any]:
    """SDXL's pipelines, its refiner, and Stable Diffusion 3."""
    d = diffusers

    def parts(**options):
        torch.manual_seed(0)
        made = {**_sd(tokenizers), **sdxl_parts(tokenizers), "unet": sdxl_unet(**options)}
        made["vae"].config.force_upcast = False
        return made

    def plain(kind, **options):
        return lambda: Family(kind.__name__, build(kind, parts()), **options)

    def refiner():
        made = parts(context=40, ids=5)
        made["text_encoder"] = made["tokenizer"] = None
        pipe = build(d.StableDiffusionXLImg2ImgPipeline, made, requires_aesthetics_score=True)
        return Family("StableDiffusionXLImg2ImgPipeline, refiner", pipe, image=image())

    def with_controlnet():
        made = parts()
        return Family(
            "StableDiffusionXLControlNetPipeline",
            build(d.StableDiffusionXLControlNetPipeline, made, controlnet=controlnet(made["unet"])),
            image=image(),
        )

    def sd3(t5=True):
        def make():
            torch.manual_seed(0)
            first, second = tokenizers["sd1"], tokenizers["sd2"]
            transformer = d.SD3Transformer2DModel(
                sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
                joint_attention_dim=96, caption_projection_dim=16, pooled_projection_dim=72, out_channels=4,
            ).eval()  # fmt: skip
            made = {
                **_sd(tokenizers),
                "tokenizer_2": second,
                "text_encoder": text_encoder(first, 32, CLIPTextModelWithProjection),
                "text_encoder_2": text_encoder(second, 40, CLIPTextModelWithProjection),
                "transformer": transformer,
                "scheduler": d.FlowMatchEulerDiscreteScheduler(),
                "tokenizer_3": first if t5 else None,
                "text_encoder_3": T5EncoderModel(
                    T5Config(vocab_size=len(first), d_model=96, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
                ).eval() if t5 else None,
            }  # fmt: skip
            pipe = build(d.StableDiffusion3Pipeline, made)
            return Family("StableDiffusion3Pipeline", pipe, max_sequence_length=16)

        return make

    def turbo():
        made = parts()
        made["scheduler"] = d.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
        pipe = build(d.StableDiffusionXLPipeline, made)
        return Family("StableDiffusionXLPipeline, Turbo", pipe, guidance_scale=0.0)

    return {
        "StableDiffusionXLPipeline": plain(d.StableDiffusionXLPipeline),
        "StableDiffusionXLPipeline, Turbo": turbo,
        "StableDiffusionXLImg2ImgPipeline": plain(d.StableDiffusionXLImg2ImgPipeline, image=image()),
        "StableDiffusionXLInpaintPipeline": plain(
            d.StableDiffusionXLInpaintPipeline, image=image(), mask_image=mask(), height=SIZE, width=SIZE
        ),
        "StableDiffusionXLImg2ImgPipeline, refiner": refiner,
        "StableDiffusionXLControlNetPipeline": with_controlnet,
        "StableDiffusionXLPAGPipeline": plain(d.StableDiffusionXLPAGPipeline, pag_scale=2.0),
        "StableDiffusion3Pipeline": sd3(),
    }
