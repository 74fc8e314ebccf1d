"""One patched pipeline, many requests: every image is that of a fresh pipeline alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from field import PROMPT, request_copy
from fleet import (
    DEFAULT,
    PROMPTS,
    RUNS,
    WAYS,
    WORKERS,
    Request,
    asked,
    assert_as_it_was,
    assert_served,
    draw,
    generate,
    in_threads,
    kinds_of,
    parts,
    stage_of,
)

import memkern


@pytest.fixture(scope="module")
def kinds(tokenizers):
    return kinds_of(tokenizers)


EVERYWHERE = [
    pytest.mark.parametrize("stage", ["embeds", "kv"]),
    pytest.mark.parametrize("way", WAYS),
    pytest.mark.parametrize("run", RUNS),
    pytest.mark.parametrize("name", ["SD", "SDXL"]),
]


def everywhere(test):
    for mark in EVERYWHERE:
        test = mark(test)
    return test


@everywhere
def test_many_requests_on_one_pipeline(kinds, name, run, way, stage):
    assert_served(kinds[name], RUNS[run], way, draw(8, stage, f"{name} {stage}", prompts=PROMPTS[:2], seeds=(0,)))


@pytest.mark.slow
@everywhere
def test_512_requests_on_one_pipeline(kinds, name, run, way, stage):
    assert_served(kinds[name], RUNS[run], way, draw(64 * WORKERS, stage, f"{name} {run} {way} {stage} 512"))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("stage", ["embeds", "kv"])
def test_pipelines_by_from_pipe_beside_a_patched_one(kinds, stage, run):
    """Each patched in its thread, while the pipeline they were made from serves its own requests by copies."""
    kind, requests = kinds["SD"], draw(16, stage, f"mixed {run}", prompts=PROMPTS[:2], seeds=(0,))
    for request in requests:
        kind.alone(request)
    pipe = kind.used()
    before = parts(pipe)
    memkern.patch(pipe, DEFAULT)
    ways = dict(zip(map(id, requests), WAYS * 8, strict=True))

    def serve(request):
        way = ways[id(request)]
        own = kind.own(pipe, way)
        with asked(own, way, request):
            return generate(own, request)

    for found, request in zip(RUNS[run](serve, requests), requests, strict=True):
        torch.testing.assert_close(found, kind.alone(request), rtol=1e-4, atol=1e-4)
    memkern.unpatch(pipe)
    assert_as_it_was(pipe, before)


@pytest.mark.parametrize("stage", ["embeds", "kv"])
def test_update_while_requests_run(kinds, stage):
    """Updates from two threads: every image is that of exactly one policy, and all are protected."""
    kind, policies = kinds["SD"], ["zero-pad:0.7", "zero-eot-pad", "prompt-from-eot"]
    wanted = [kind.alone(Request(policy, stage, PROMPT, 0)) for policy in policies]
    pipe = kind.make()
    patch = memkern.patch(pipe, policies[0], stage=stage)
    over = threading.Event()

    def change(shift):
        index = shift
        while not over.is_set():
            patch.update(policies[index % len(policies)])
            index += 1
            over.wait(0.001)

    with ThreadPoolExecutor(2) as changing:
        changes = [changing.submit(change, shift) for shift in range(2)]
        try:
            request = Request("", "", PROMPT, 0)
            made = in_threads(lambda _: generate(request_copy(pipe), request), range(24))
        finally:
            over.set()
        for one in changes:
            one.result()
    for found in made:
        assert sum(torch.allclose(found, one, rtol=1e-4, atol=1e-4) for one in wanted) == 1
    counts = memkern.status(pipe).counts
    assert (counts.protected, counts.exempt, counts.unedited, counts.refused) == (24, 0, 0, 0)


@pytest.mark.parametrize("stage", ["embeds", "kv"])
def test_patched_blocks_that_overlap_on_an_unpatched_pipeline(kinds, stage):
    """The patch is taken out when the last block has ended, whichever was first; each request has its own policy."""
    kind = kinds["SD"]
    pipe = kind.used()
    before = parts(pipe)
    barrier = threading.Barrier(4)
    policies = ["zero-pad:0.7", "none", "ren:1.25", "zero-eot-pad"]

    def serve(policy):
        request = Request(policy, stage_of(policy, stage), PROMPT, 0)
        barrier.wait(60)
        with memkern.patched(pipe, policy, stage=request.stage):
            barrier.wait(60)  # all are inside
            assert memkern.status(pipe).patched
            found = generate_in_turn(pipe, request)
        return request, found

    turn = threading.Lock()

    def generate_in_turn(pipe, request):
        with turn:  # one scheduler
            return generate(pipe, request)

    with ThreadPoolExecutor(4) as pool:
        for request, found in pool.map(serve, policies):
            assert torch.allclose(found, kind.alone(request), rtol=1e-4, atol=1e-4), request
    assert not memkern.status(pipe).patched
    assert_as_it_was(pipe, before)


@pytest.mark.parametrize("run", RUNS)
def test_exceptions_in_some_requests_are_no_matter_to_others(kinds, run):
    """Requests that fail, in a callback or by raw embeddings, raise or are refused; the rest is as usual."""
    kind, requests = kinds["SD"], draw(24, "embeds", "exceptions", prompts=PROMPTS[:2], seeds=(0,))
    for request in requests:
        kind.alone(request)
    pipe = kind.used()
    raw = torch.zeros(1, 77, 32)
    before = parts(pipe)
    memkern.patch(pipe, DEFAULT)
    numbers = {id(request): index for index, request in enumerate(requests)}

    def fail(*args):
        raise KeyError("a callback")

    def serve(request):
        own, number = request_copy(pipe), numbers[id(request)]
        try:
            with memkern.using(own, "zero-pad:0.7" if number % 3 == 2 else request.policy):
                if number % 3 == 1:
                    own(request.prompt, num_inference_steps=2, height=16, width=16, callback_on_step_end=fail)
                if number % 3 == 2:
                    own(prompt_embeds=raw, num_inference_steps=2, height=16, width=16)
                return generate(own, request)
        except (KeyError, memkern.UnmitigatedError) as error:
            return type(error)

    made = RUNS[run](serve, requests)
    for index, (found, request) in enumerate(zip(made, requests, strict=True)):
        if index % 3:
            assert found is (KeyError if index % 3 == 1 else memkern.UnmitigatedError)
        else:
            assert torch.allclose(found, kind.alone(request), rtol=1e-4, atol=1e-4), request
    assert memkern.status(pipe).counts.refused == len(requests) // 3
    memkern.unpatch(pipe)
    assert_as_it_was(pipe, before)
