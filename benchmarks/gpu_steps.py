"""A UNet step of SD 1.5's and SDXL's configurations on a GPU: eager, compiled and captured, patched and not, with the
prediction of benchmarks/model.py beside it. Weights are random and float16; no file is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from configurations import SD15_UNET, SDXL_UNET, VIT_G, VIT_L, text_config
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import memkern
from memkern.benchmark import Run
from memkern.benchmark.given import STEPS
from memkern.benchmark.run import PROMPT
from memkern.benchmark.subject import Subject
from memkern.benchmark.tables import table
from memkern.benchmark.turns import Spread, in_turn
from memkern.ops.triton import estimate
from memkern.ops.triton.configs import Card
from memkern.presets import DEFAULT_POLICIES
from memkern.testing import tiny_pipeline, train_tokenizer

ROUNDS = 15


class Model(NamedTuple):
    """What is measured of a model.

    Attributes:
        name: in the report.
        make: makes its pipeline on a device.
        policies: that are compared with no patch; each compiled one takes minutes.
    """

    name: str
    make: Callable[[str], Any]
    policies: tuple[str, ...]


@contextmanager
def half_on(device: str) -> Iterator[None]:
    """Modules that are made in this block are float16 and on `device` from the start: SDXL's UNet alone is 5 GB."""
    former = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(former)


def sd15(device: str, **sizes: Any) -> Any:
    """A pipeline of SD 1.5's configuration with a tiny VAE; `sizes` replace parts of the UNet's."""
    tokenizer = train_tokenizer([PROMPT])
    with half_on(device):
        encoder = CLIPTextModel(text_config(tokenizer, VIT_L)).eval()
        unet = UNet2DConditionModel(**SD15_UNET | sizes).eval()
    return tiny_pipeline(tokenizer, width=768, text_encoder=encoder, unet=unet).to(device, torch.float16)


def sdxl(device: str, **sizes: Any) -> Any:
    """A pipeline of SDXL's configuration with a tiny VAE and text encoders of two layers; `sizes` as in `sd15`."""
    tokenizer = train_tokenizer([PROMPT])
    with half_on(device):
        first = CLIPTextModel(text_config(tokenizer, VIT_L, num_hidden_layers=2)).eval()
        second = CLIPTextModelWithProjection(
            text_config(tokenizer, VIT_G, num_hidden_layers=2, projection_dim=1280)
        ).eval()
        unet = UNet2DConditionModel(**SDXL_UNET | sizes).eval()
    tiny = tiny_pipeline(tokenizer)
    pipe = StableDiffusionXLPipeline(tiny.vae, first, second, tokenizer, tokenizer, unet, tiny.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, torch.float16)


MODELS = (Model("SD 1.5", sd15, DEFAULT_POLICIES), Model("SDXL", sdxl, DEFAULT_POLICIES[1:]))


def report(model: Model, device: str = "cuda", *, compile: bool = True, rounds: int = ROUNDS) -> list[str]:
    """The part of the report that is about one model, in Markdown."""
    pipe = model.make(device)
    measured = memkern.bench(pipe, model.policies, compile=compile, rounds=rounds, quiet=True)
    lines = ["", f"## A UNet step of {model.name}", "", table(measured.runs)]
    unpatched = measured.runs[0].step.spread.median
    card = Card.of(torch.device(device))
    width = pipe.unet.config.cross_attention_dim
    lines += ["| eager | measured change, ms | predicted by cross-attention alone, ms |", "| --- | ---: | ---: |"]
    for run in measured.runs[1:]:
        if not run.compiled:
            change = run.step.spread.median - unpatched
            lines.append(f"| {run.policy} | {change:+.2f} | {1e3 * predicted(run, width, card):+.2f} |")
    if device != "cpu":
        lines += ["", "| captured in a CUDA graph | ms | ratio |", "| --- | ---: | ---: |"]
        lines += captured(pipe, model, rounds)
    return lines


def predicted(run: Run, width: int, card: Card) -> float:
    """Seconds by which the estimates of the layers' paths differ from those of their own processors."""
    total = 0.0
    for choice in run.layers.values():
        if choice.get("keys"):
            layer = estimate.Layer(*choice["sizes"], tuple(choice["keys"]), 77, width)
            total += estimate.seconds(choice["path"], layer, card) - estimate.seconds("former", layer, card)
    return total


@torch.no_grad()
def captured(pipe: Any, model: Model, rounds: int) -> list[str]:
    """Rows for the unpatched pipeline and each policy: replays of a captured step, in turn."""
    given = {"prompt": [PROMPT], "num_inference_steps": STEPS, "output_type": "latent"}
    subjects, replays, names = [Subject(pipe, None)], [], ["unpatched", *model.policies]
    with ExitStack() as stack:
        subjects += [Subject(pipe, memkern.Policy.parse(policy)) for policy in model.policies]
        for subject in subjects:
            stack.callback(subject.close)
            step = stack.enter_context(subject.asked(given)).step
            replays.append(functools.partial(_replayed, _graph(step)))
        times = in_turn(replays, rounds, warm_up=3)
    return [_row(name, own, times[0]) for name, own in zip(names, times, strict=True)]


def _graph(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A step, called three times and then captured; the outputs live as long as the graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _row(name: str, own: Sequence[float], unpatched: Sequence[float]) -> str:
    ratio = Spread.of([one / other for one, other in zip(own, unpatched, strict=True)])
    shown = "–" if own is unpatched else f"{ratio.median:.3f} ({ratio.low:.3f}–{ratio.high:.3f})"
    return f"| {name} | {Spread.of(own).median:.2f} | {shown} |"
