"""A pipeline as one file in A1111's layout: the names that diffusers' loader takes apart, put together."""

from __future__ import annotations

import re

from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_shortcut": "nin_shortcut",
}


def write_single_file(pipe, path):
    """The weights of a Stable Diffusion 1 pipeline of any size."""
    tensors = {f"model.diffusion_model.{unet_name(pipe, key)}": v for key, v in pipe.unet.state_dict().items()}
    tensors |= {f"first_stage_model.{vae_name(pipe, key)}": v for key, v in pipe.vae.state_dict().items()}
    prefix = "cond_stage_model.transformer.text_model."
    for key, value in pipe.text_encoder.state_dict().items():
        tensors[prefix + key.removeprefix("text_model.")] = value
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


def unet_name(pipe, key):
    layers = pipe.unet.config.layers_per_block
    for ours, theirs in UNET.items():
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs, 1)
    found = re.fullmatch(
        r"(down|mid|up)_blocks?\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key
    )
    where, block, kind, layer, rest = found.groups()
    layer = int(layer)
    if kind == "resnets":
        part, _, last = rest.rpartition(".")
        rest = f"{RESNET[part]}.{last}"
    if where == "mid":
        return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{rest}"
    block = int(block)
    if where == "down":
        at = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else layer)
        inner = {"resnets": "0.", "attentions": "1.", "downsamplers": "0.op."}[kind]
        return f"input_blocks.{at}.{inner}{rest.removeprefix('conv.') if kind == 'downsamplers' else rest}"
    at = block * (layers + 1) + (layers if kind == "upsamplers" else layer)
    has_attention = pipe.unet.up_blocks[block].__class__.__name__.startswith("CrossAttn")
    inner = {"resnets": "0.", "attentions": "1.", "upsamplers": "2." if has_attention else "1."}[kind]
    return f"output_blocks.{at}.{inner}{rest}"


def vae_name(pipe, key):
    for ours, theirs in VAE.items():
        key = key.replace(ours, theirs)
    last = len(pipe.vae.config.block_out_channels) - 1
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", key)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", key)
