"""The ways in which people run a pipeline; each function prepares one, and returns options of its calls.

`verdict` runs one and returns its properties, for a cell of `docs/compatibility.md` or for a test.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from companions import GROUP_OFFLOAD_ON_CPU, fused_qkv, group_offload, ip_adapter, lora, sequential_offload, slicing
from diffusers.models import attention_processor as theirs
from families import sd_families, sdxl_families
from vocabulary import clip_vocabulary

import memkern
from memkern.pipelines.unet.layers import cross_attention_layers
from memkern.testing import clip_tokenizer

POLICY = "zero-pad:0.7"
STAGES = ("embeds", "kv")
HERE = Path(__file__).parent
LIBRARIES = Path(sys.prefix) / "quantized"
"""The folder in which `make` puts libraries that quantize."""


def as_it_is(pipe, stack):
    return {}


def inference_mode(pipe, stack):
    stack.enter_context(torch.inference_mode())
    return {}


def autocast(pipe, stack):
    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    return {}


def compiled(pipe, stack):
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager", fullgraph=True)
    return {}


def compiled_in_place(pipe, stack):
    torch._dynamo.reset()
    pipe.unet.compile(backend="aot_eager", fullgraph=True)
    return {}


def compiled_blocks(pipe, stack):
    torch._dynamo.reset()
    pipe.unet.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    return {}


def compiled_under_autocast(pipe, stack):
    compiled(pipe, stack)
    return autocast(pipe, stack)


def compiled_in_inference_mode(pipe, stack):
    compiled(pipe, stack)
    return inference_mode(pipe, stack)


def compiled_with_ip_adapter(pipe, stack):
    options = ip_adapter(pipe)
    compiled(pipe, stack)
    return options


def two_ip_adapters(pipe, stack):
    options = ip_adapter(pipe, 2)
    one = pipe.unet.encoder_hid_proj.image_projection_layers[0]
    pipe.unet.encoder_hid_proj.image_projection_layers.append(copy.deepcopy(one))
    for _, attn in cross_attention_layers(pipe.unet):
        own = attn.processor
        for weights in (own.to_k_ip, own.to_v_ip):
            weights.append(copy.deepcopy(weights[0]))
        own.scale, own.num_tokens = [1.0, 0.5], [4, 4]
    (rows,) = options["ip_adapter_image_embeds"]
    return {"ip_adapter_image_embeds": [rows, -rows]}


def masked_ip_adapter(pipe, stack):
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    return {**ip_adapter(pipe), "cross_attention_kwargs": {"ip_adapter_masks": [mask]}}


class XFormersAttnProcessor(theirs.AttnProcessor2_0):
    """A processor with the name and signature of diffusers' own, which needs the package."""


class AttnProcessor2_0(torch.nn.Module):
    """A processor as IP-Adapter's own code writes it."""

    __call__ = theirs.AttnProcessor2_0.__call__


class Unknown(theirs.AttnProcessor2_0):
    """A user's own processor, which may compute anything."""


def with_processors(kind, pipe, stack):
    for _, attn in cross_attention_layers(pipe.unet):
        attn.set_processor(kind())
    return {}


def layerwise_casting(pipe, stack):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return {}


def torchao(config, pipe, stack):
    from torchao import quantization

    quantization.quantize_(pipe.unet, getattr(quantization, config)())
    return {}


def quanto(pipe, stack):
    from optimum.quanto import freeze, qint8, quantize

    quantize(pipe.unet, weights=qint8)
    freeze(pipe.unet)
    return {}


def _exchange(pipe, make, fits=lambda linear: True):
    for _, attn in cross_attention_layers(pipe.unet):
        for name in ("to_q", "to_k", "to_v"):
            if fits(getattr(attn, name)):
                setattr(attn, name, make(getattr(attn, name)))
    return {}


def gguf(pipe, stack):
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quants

    def make(linear):
        kind = GGMLQuantizationType.Q8_0
        made = GGUFLinear(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
        values = torch.from_numpy(quants.quantize(linear.weight.detach().numpy(), kind))
        made.weight = GGUFParameter(values, quant_type=kind)
        return made

    return _exchange(pipe, make, lambda linear: linear.in_features % 32 == 0)


def bitsandbytes(pipe, stack):
    from bitsandbytes.nn import LinearNF4

    def make(linear):
        made = LinearNF4(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
        made.load_state_dict(linear.state_dict())
        return made.to("cpu")

    return _exchange(pipe, make)


def pag(pipe, stack):
    if "PAG" not in type(pipe).__name__:
        return None
    return {"pag_scale": 3.0}


def both(*ways):
    """A way that is one way after another."""

    def way(pipe, stack):
        return {name: value for one in ways for name, value in one(pipe, stack).items()}

    return way


WAYS = {
    "as it is": as_it_is,
    "inference_mode": inference_mode,
    "autocast": autocast,
    "torch.compile(unet), fullgraph": compiled,
    "unet.compile(), fullgraph": compiled_in_place,
    "compile_repeated_blocks, fullgraph": compiled_blocks,
    "torch.compile under autocast": compiled_under_autocast,
    "torch.compile in inference_mode": compiled_in_inference_mode,
    "torch.compile with IP-Adapter": compiled_with_ip_adapter,
    "LoRA": lambda pipe, stack: lora(pipe),
    "IP-Adapter": lambda pipe, stack: ip_adapter(pipe),
    "two IP-Adapters": two_ip_adapters,
    "IP-Adapter with masks": masked_ip_adapter,
    "PAG": pag,
    "fused QKV": lambda pipe, stack: fused_qkv(pipe),
    "attention slicing": lambda pipe, stack: slicing(pipe),
    "xformers (a class of its name)": functools.partial(with_processors, XFormersAttnProcessor),
    "processors that are modules": functools.partial(with_processors, AttnProcessor2_0),
    "a processor of one's own": functools.partial(with_processors, Unknown),
    "sequential offload": lambda pipe, stack: sequential_offload(pipe),
    "layerwise casting": layerwise_casting,
    "torchao int8": functools.partial(torchao, "Int8WeightOnlyConfig"),
    "torchao float8": functools.partial(torchao, "Float8WeightOnlyConfig"),
    "quanto int8": quanto,
    "GGUF Q8_0": gguf,
    "bitsandbytes NF4": bitsandbytes,
    "torchao int8 under autocast": both(functools.partial(torchao, "Int8WeightOnlyConfig"), autocast),
    "bitsandbytes NF4 under autocast": both(bitsandbytes, autocast),
}
if GROUP_OFFLOAD_ON_CPU:
    WAYS["group offload"] = lambda pipe, stack: group_offload(pipe)

QUANTIZED = tuple(name for name in WAYS if name.startswith(("torchao", "quanto", "GGUF", "bitsandbytes")))
"""The ways that need libraries which are not for every process."""

CLOSE, ROUNDED = 1e-3, 2.0
"""The largest difference of an image from the expected one, as a share of its largest value; where autocast rounds, the
largest error against the same without autocast, as a multiple of the unpatched pipeline's.
"""


@dataclass
class Verdict:
    """The properties of a pipeline that is run in a way.

    Attributes:
        protected: whether the image is that of an unpatched pipeline that is given an edited context; None where the
            pipeline has no such way.
        accelerated: whether all cross-attention layers are computed from what is kept.
        told: the message of memkern if one of the two is false; empty if there is none.
    """

    protected: bool | None
    accelerated: bool = False
    told: str = ""


def verdict(make, name: str, stage: str, *, last: bool = False) -> Verdict:
    """Run a pipeline in a way, patched before or, if `last`, after it is prepared."""
    family, plain = make(), make()
    with contextlib.ExitStack() as stack, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = WAYS[name](plain.pipe, stack)
        if options is None:
            return Verdict(None)
        expected = plain(steps=4, **options)
        embeds = _edited(plain.pipe)
        by_hand = plain(None, steps=4, **embeds, **options)
        if not last:
            WAYS[name](family.pipe, stack)
        caught.clear()
        try:
            memkern.patch(family.pipe, POLICY, stage=stage)
            if last:
                WAYS[name](family.pipe, stack)
            made = family(steps=4, **options)
        except (ValueError, memkern.UnmitigatedError) as error:
            return Verdict(False, told=f"refused: {error}")
        is_close = _far(made, by_hand) < CLOSE
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                exact = plain(None, steps=4, **{key: one.float() for key, one in embeds.items()}, **options)
            is_close = _far(made, exact) < ROUNDED * _far(by_hand, exact)
        protected = is_close and _far(made, expected) > 2 * _far(made, by_hand)
        status = memkern.status(family.pipe)
        layers = len(cross_attention_layers(family.pipe.unet))
        paths = [choice.partition(" ")[0] for choice in status.layers.values()]
        accelerated = status.kept > 0 and sum(path in ("projected", "absorbed") for path in paths) == layers
        said = [str(one.message) for one in caught if "memkern" in str(one.message)] + list(status.notes)
        return Verdict(protected, accelerated, "; ".join(said) if not (protected and accelerated) else "")


def _far(image: torch.Tensor, expected: torch.Tensor) -> float:
    return float((image - expected).abs().max() / expected.abs().max())


def _edited(pipe) -> dict[str, torch.Tensor]:
    """The patched pipeline's embeddings, as arguments of an unpatched one."""
    with memkern.patched(pipe, POLICY, accelerate=False, stage="embeds"):
        encoded = pipe.encode_prompt("a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    return dict(zip(names, encoded, strict=False))


def main() -> None:
    """Print the verdicts of the ways that are named, of each family and stage, as JSON: for another process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {
        family: {name: {stage: asdict(verdict(make, name, stage)) for stage in STAGES} for name in sys.argv[1:]}
        for family, make in pipelines().items()
    }
    print(json.dumps(found))


def pipelines():
    """The pipelines on which the ways are tried."""
    tokens, merges = clip_vocabulary()
    tokenizers = {"sd1": clip_tokenizer(tokens, merges), "sd2": clip_tokenizer(tokens, merges, pad_token="!")}
    return {
        "SD": sd_families(tokenizers)["StableDiffusionPipeline"],
        "SDXL": sdxl_families(tokenizers)["StableDiffusionXLPipeline"],
    }


def quantized_verdicts() -> dict:
    """The verdicts of the quantized ways, by a process that has their libraries; empty where they are not."""
    if not LIBRARIES.is_dir():
        return {}
    folders = [str(LIBRARIES), str(HERE), str(HERE.parent), str(HERE.parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    ran = subprocess.run(
        [sys.executable, str(HERE / "ways.py"), *QUANTIZED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    return {
        family: {name: {stage: Verdict(**one) for stage, one in stages.items()} for name, stages in names.items()}
        for family, names in found.items()
    }


if __name__ == "__main__":
    main()
