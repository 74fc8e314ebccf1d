"""Companions of a pipeline, in a tiny form; each function changes the pipeline and returns call options."""

from __future__ import annotations

import copy

import diffusers
import torch
from packaging.version import Version
from peft import LoraConfig

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def lora(pipe, name="style", seed=1, targets=TARGETS):
    """A LoRA on the UNet's attention that changes its output."""
    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False), name)
    return {}


def ip_adapter(pipe, seed=2):
    """An IP-Adapter with four image tokens, and the embeddings of an image."""
    torch.manual_seed(seed)
    unet, dim = pipe.unet, 12
    width = unet.config.cross_attention_dim
    layers, key = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        layers[f"{key}.to_k_ip.weight"] = torch.randn(hidden, width) / width**0.5
        layers[f"{key}.to_v_ip.weight"] = torch.randn(hidden, width) / width**0.5
        key += 2
    projection = {
        "proj.weight": torch.randn(4 * width, dim) / dim**0.5,
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    # Rows for guidance: the negative image first.
    return {"ip_adapter_image_embeds": [torch.randn(2, 1, dim, generator=torch.Generator().manual_seed(3))]}


def free_u(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return {}


def slicing(pipe):
    pipe.enable_attention_slicing(1)
    return {}


def fused_qkv(pipe):
    pipe.fuse_qkv_projections()
    return {}


def textual_inversion(pipe, vectors=4):
    """A concept of several tokens, <thing>."""
    torch.manual_seed(4)
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)  # tests share it
    width = pipe.text_encoder.get_input_embeddings().weight.shape[1]
    pipe.load_textual_inversion({"<thing>": torch.randn(vectors, width)}, token="<thing>")
    return {}


def sequential_offload(pipe):
    from accelerate import cpu_offload

    for part in ("vae", "text_encoder", "text_encoder_2", "unet"):
        if getattr(pipe, part, None) is not None:
            cpu_offload(getattr(pipe, part), torch.device("cpu"), offload_buffers=True)
    return {}


def group_offload(pipe):
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    return {}


def compiled(pipe):
    """The graph is what counts here; "eager" runs it without a compiler."""
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    return {}


def clip_skip(pipe):
    return {"clip_skip": 1}


COMPANIONS = {
    "LoRA": lora,
    "IP-Adapter": ip_adapter,
    "textual inversion": textual_inversion,
    "FreeU": free_u,
    "attention slicing": slicing,
    "fused QKV": fused_qkv,
    "sequential offload": sequential_offload,
    "torch.compile of the UNet": compiled,
}
GROUP_OFFLOAD_ON_CPU = Version(diffusers.__version__) >= Version("0.42")
"""Older versions of diffusers need an accelerator for it."""
if GROUP_OFFLOAD_ON_CPU:
    COMPANIONS["group offload"] = group_offload
