"""Many requests on one pipeline, and what a fresh pipeline alone generates for each."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from families import sdxl_families
from field import OTHER, PROMPT, locked, request_copy
from test_patching import snapshot

import memkern
from memkern.testing import tiny_pipeline

POLICIES = ["swap-pad-zero-eot", "swap-pad", "zero-pad:0.7", "zero-eot-pad", "prompt-from-eot", "ren:1.25", "none"]
"""Five presets that edit embeddings, one that edits logits, and unprotected by choice."""
PROMPTS = [PROMPT, OTHER, "an oil painting of two dogs on a mat", ""]
SEEDS = (0, 1)
DEFAULT = "zero-eot"
"""The policy of the pipelines' patches. No request asks for it, so that one which loses its own is noticed."""
WORKERS = 8
WAYS = ["copy", "from_pipe"]


@dataclass(frozen=True)
class Request:
    """A request; `stage` is where `policy` is to be applied."""

    policy: str
    stage: str
    prompt: str
    seed: int


def draw(number, stage, seed, *, prompts=PROMPTS, seeds=SEEDS):
    """That many requests, from a generator of their own; the first ones have every policy."""
    chosen = random.Random(seed)
    policies = chosen.sample(POLICIES, len(POLICIES)) + chosen.choices(POLICIES, k=number)
    return [
        Request(policy, stage_of(policy, stage), chosen.choice(prompts), chosen.choice(seeds))
        for policy in policies[:number]
    ]


def stage_of(policy, stage):
    return "kv" if policy.startswith("ren") else stage


def generate(pipe, request):
    """Latents after two steps."""
    return pipe(
        request.prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(request.seed),
        output_type="latent", height=16, width=16,
    ).images  # fmt: skip


class Kind:
    """A family of pipelines, all alike, and what a fresh one alone generates."""

    def __init__(self, kind, make):
        self.kind, self.make, self.known = kind, make, {}
        self.lock = threading.Lock()

    def alone(self, request):
        """The image of a fresh pipeline that serves this request and no other; unpatched where it names no policy."""
        with self.lock:
            if request not in self.known:
                pipe = self.make()
                if request.policy:
                    memkern.patch(pipe, request.policy, stage=request.stage)
                self.known[request] = generate(pipe, request)
            return self.known[request]

    def used(self):
        """A pipeline that has generated once: transformers leaves marks on its modules then."""
        pipe = self.make()
        generate(pipe, Request("", "", PROMPT, 0))
        return pipe

    def own(self, pipe, way):
        """A pipeline of a request's own, with a scheduler of its own."""
        if way == "copy":
            return request_copy(pipe)
        made = self.kind.from_pipe(pipe)
        made.set_progress_bar_config(disable=True)
        made.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        return made


def kinds_of(tokenizers):
    """The kinds of Stable Diffusion and of SDXL."""

    def sd():
        return tiny_pipeline(locked(tokenizers["sd1"]))

    def sdxl():
        own = {name: locked(tokenizer) for name, tokenizer in tokenizers.items()}
        return sdxl_families(own)["StableDiffusionXLPipeline"]().pipe

    return {"SD": Kind(StableDiffusionPipeline, sd), "SDXL": Kind(StableDiffusionXLPipeline, sdxl)}


@contextlib.contextmanager
def asked(pipe, way, request):
    """`pipe` as `request` asks for it: a copy by `using`, one by `from_pipe` patched in this very thread."""
    if way == "copy":
        with memkern.using(pipe, request.policy, stage=request.stage):
            yield
        return
    memkern.patch(pipe, request.policy, stage=request.stage)
    try:
        yield
    finally:
        memkern.unpatch(pipe)


def in_threads(serve, requests):
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(serve, requests))


def in_tasks(serve, requests):
    """Serve in tasks of one event loop; `to_thread` hands on a task's context."""

    async def worker(waiting, made):
        for index, request in waiting:
            made[index] = await asyncio.to_thread(serve, request)

    async def run():
        waiting, made = iter(enumerate(requests)), {}
        await asyncio.gather(*(worker(waiting, made) for _ in range(WORKERS)))
        return [made[index] for index in range(len(requests))]

    return asyncio.run(run())


RUNS = {"threads": in_threads, "tasks": in_tasks}


def parts(pipe):
    """`snapshot`, and a second text encoder."""
    found = snapshot(pipe)
    if getattr(pipe, "text_encoder_2", None) is not None:
        for name, module in pipe.text_encoder_2.named_modules():
            found |= {("text_encoder_2", name, key): id(value) for key, value in vars(module).items()}
            for key in ("_forward_pre_hooks", "_forward_hooks"):
                found["text_encoder_2", name, key, "names"] = tuple(getattr(module, key))
    found["class"] = type(pipe)
    return found


def assert_as_it_was(pipe, before):
    after = parts(pipe)
    # What a call of the pipeline itself leaves behind (its guidance scale and the like) is not memkern's.
    kept = {key for key in {*before, *after} if not (key[0] == "pipe" and key[1].startswith("_"))}
    assert sorted(str(key) for key in kept if after.get(key) != before.get(key)) == []


def control(kind, run, requests):
    """True if the unpatched pipeline's images in threads are bit for bit those of one alone."""
    pipe = kind.make()
    made = run(lambda request: generate(request_copy(pipe), request), requests)
    return all(torch.equal(found, kind.alone(request)) for found, request in zip(made, requests, strict=True))


def assert_served(kind, run, way, requests):
    """Serve `requests`; every image is that of a pipeline alone, the counts add up, and nothing is left behind."""
    unpatched = [Request("", "", request.prompt, request.seed) for request in requests]
    exact = control(kind, run, unpatched)
    for request in set(requests):
        kind.alone(request)
    pipe = kind.used()
    before = parts(pipe)
    if way == "copy":
        memkern.patch(pipe, DEFAULT)
    counted = []

    def serve(request):
        own = kind.own(pipe, way)
        with asked(own, way, request):
            made = generate(own, request)
            if way == "from_pipe":
                counted.append(memkern.status(own).counts)
        return made

    made = run(serve, requests)
    wrong = []
    for found, request in zip(made, requests, strict=True):
        wanted = kind.alone(request)
        if not (torch.equal(found, wanted) if exact else torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)):
            wrong.append(request)
    assert not wrong, f"{len(wrong)} of {len(requests)}: {wrong[:3]}"
    if way == "copy":
        counted.append(memkern.status(pipe).counts)
    exempt = sum(request.policy == "none" for request in requests)
    assert sum(counts.exempt for counts in counted) == exempt
    assert sum(counts.protected for counts in counted) == len(requests) - exempt
    assert sum(counts.unedited + counts.refused for counts in counted) == 0
    if way == "copy":
        again = Request(DEFAULT, "embeds", PROMPT, 0)
        assert torch.allclose(generate(pipe, again), kind.alone(again), rtol=1e-4, atol=1e-4)
    memkern.unpatch(pipe)
    assert_as_it_was(pipe, before)
