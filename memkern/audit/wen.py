"""Wen et al., "Detecting, explaining, and mitigating memorization in diffusion models", ICLR 2024, section 5.1."""

from __future__ import annotations

from typing import Any

import torch

STEPS, RATE = 10, 0.05


def optimized(
    pipe: Any, text: str, generator: torch.Generator, options: dict[str, Any], target: float
) -> dict[str, torch.Tensor]:
    """A prompt's embedding, changed until the text-conditional noise of the first step is at most `target`.

    At most ten steps of AdamW minimize ‖ε(x_T, c) - ε(x_T, ∅)‖₂ at the latents that the generation starts from;
    SOT's gradient is 0, so that its row only decays.

    Args:
        generator: of the generation. Its state does not change: a twin with its seed draws the latents.
        options: of the pipeline; "num_inference_steps" sets the first time.

    Returns:
        "prompt_embeds" and "negative_prompt_embeds", `[1, L, D]` each, for the pipeline.

    Raises:
        ValueError: the UNet takes more than a context, as SDXL's does.
    """
    unet, scheduler = pipe.unet, pipe.scheduler
    if unet.config.addition_embed_type is not None:
        raise ValueError(f"wen: published for a UNet that takes only a context; that of {type(pipe).__name__} does not")
    device = pipe._execution_device
    with torch.no_grad():
        positive, negative = pipe.encode_prompt(text, device, 1, True)[:2]
    scheduler.set_timesteps(options["num_inference_steps"], device=device)
    first = scheduler.timesteps[0]
    side = unet.config.sample_size * pipe.vae_scale_factor
    twin = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    latents = pipe.prepare_latents(1, unet.config.in_channels, side, side, positive.dtype, device, twin)
    noisy = scheduler.scale_model_input(torch.cat([latents] * 2), first)
    changed = positive.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([changed], lr=RATE)
    with torch.enable_grad():
        for _ in range(STEPS):
            context = torch.cat([negative, changed])
            without, given = unet(noisy, first, encoder_hidden_states=context, return_dict=False)[0].chunk(2)
            magnitude = (given - without).norm()
            if magnitude.item() <= target:
                break
            (changed.grad,) = torch.autograd.grad(magnitude, [changed])
            changed.grad[:, 0] = 0
            optimizer.step()
    return {"prompt_embeds": changed.detach(), "negative_prompt_embeds": negative}
