"""Helpers for the cases from the field: images, the same by hand without memkern, and the warnings."""

from __future__ import annotations

import copy
import functools
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from by_hand import context
from kv_by_hand import install, ren, roles_of, zero_pads

import memkern
from memkern.testing import tiny_pipeline

PROMPT = "a cat"
OTHER = "a photograph of an astronaut riding a horse"
ON_UNKNOWN = ("raise", "warn", "pass")
STAGES = ("embeds", "kv")
WAIT = 60
"""Seconds after which a thread that is not released fails."""


def image(pipe, prompt=PROMPT, steps=3, **options):
    """Latents after a few steps, always from the same noise."""
    options = {"output_type": "latent", "height": 16, "width": 16, **options}
    return pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **options).images


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def is_same(actual, expected):
    return bool(torch.allclose(actual, expected, rtol=1e-4, atol=1e-4))


def differ(actual, expected):
    assert (actual - expected).abs().max() > 1e-3


@torch.no_grad()
def halves(pipe, prompt, policy):
    """The cond and the uncond row of an unpatched pipeline, edited by hand."""
    uncond, cond = context(pipe, [prompt], policy).chunk(2)
    return cond, uncond


def edited_image(pipe, policy, prompt=PROMPT, **options):
    """The image of an unpatched pipeline that is given the context edited by hand."""
    cond, uncond = halves(pipe, prompt, policy)
    return image(pipe, None, prompt_embeds=cond, negative_prompt_embeds=uncond, **options)


def pads_zeroed(tokenizer, where, prompt=PROMPT, **options):
    """The image of a pipeline whose pads are zeroed where `where(layer, step)` is true, by hand."""
    plain = tiny_pipeline(tokenizer)
    return image(install(plain, zero_pads(roles_of(plain, [prompt]), where)), prompt, **options)


def ren_image(tokenizer, factor=1.25, prompt=PROMPT, **options):
    """The image of Ren et al.'s policy, by hand."""
    plain = tiny_pipeline(tokenizer)
    return image(install(plain, ren(roles_of(plain, [prompt]), 1, factor)), prompt, **options)


def outcome(call):
    """The value of `call()`, or None where it raised UnmitigatedError; and the warnings until then."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = call()
        except memkern.UnmitigatedError as error:
            return None, [str(error)]
    return made, [str(one.message) for one in caught if issubclass(one.category, memkern.UnmitigatedWarning)]


def assert_told(on_unknown, made, said, match=""):
    """Assert that an unedited prompt raised or warned as `on_unknown` says; `made` and `said` are an `outcome`."""
    if on_unknown == "raise":
        assert made is None, "an unedited prompt went through without a word"
    else:
        assert made is not None, f"on_unknown={on_unknown!r} raised: {said}"
    if on_unknown == "pass":
        assert said == []
    else:
        assert said, "an unedited prompt went through without a word"
        assert any(re.search(match, one) for one in said), said


def told(on_unknown, call, match=""):
    """The image of `call()`, None for "raise", having seen that it warned or raised as `on_unknown` says."""
    made, said = outcome(call)
    assert_told(on_unknown, made, said, match)
    return made


def counts(pipe):
    """Protected, exempt, unedited rows and refused requests, since patching."""
    found = memkern.status(pipe).counts
    return found.protected, found.exempt, found.unedited, found.refused


def lines(value):
    """Text that may be one string, or several."""
    return value if isinstance(value, str) else "\n".join(map(str, value))


def edited_or_told(pipe, on_unknown, call, edited, *, match=""):
    """A case's right value: the edited image; or this very call warns or raises, and status says as much."""
    made, said = outcome(call)
    if made is not None and is_same(made, edited):
        assert said == []
        assert counts(pipe) == (1, 0, 0, 0)
        return
    assert_told(on_unknown, made, said, match)
    protected, exempt, unedited, refused = counts(pipe)
    if on_unknown == "raise":
        assert (protected, exempt, unedited, refused) == (0, 0, 0, 1)
    else:
        assert (protected, exempt, refused) == (0, 0, 0)
        assert unedited >= 1
    assert lines(memkern.status(pipe).reached), "status does not say what was not reached"


def claims(status):
    """The lines about the last prompts that report an edit without saying that it did not reach the UNet."""
    excuses = ("not reached", "unedited", "not edited", " 0 of")
    effects = ("zeroed", "excluded", "scaled")
    return [
        line
        for line in map(str, status.prompts)
        if any(effect in line for effect in effects) and not any(excuse in line for excuse in excuses)
    ]


def locked(tokenizer, inside=None):
    """A copy of a tokenizer that one thread at a time may call, as diffusers' server example has it.

    Tokenizers in Rust otherwise raise "Already borrowed", or pad as another thread asked: `tokenize`, which pipelines
    call first, takes the padding off. `inside(thread's name)` is called first, without the lock.
    """
    lock, kind = threading.RLock(), type(tokenizer)

    def one_at_a_time(name):
        method = getattr(kind, name)

        @functools.wraps(method)
        def call(self, *args, **kwargs):
            if inside is not None and name == "__call__":
                inside(threading.current_thread().name)
            with lock:
                return method(self, *args, **kwargs)

        return call

    methods = {name: one_at_a_time(name) for name in ("__call__", "tokenize", "encode", "decode", "batch_decode")}
    made = copy.deepcopy(tokenizer)
    made.__class__ = type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})
    return made


def request_copy(pipe):
    """A shallow copy with a scheduler of its own, as in diffusers' server example."""
    made = copy.copy(pipe)
    made.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return made


def in_thread(function, *args):
    """The result of `function` in a thread of its own, or its exception."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(WAIT)


def between_steps(first, other, *, step=0):
    """Two functions in threads: `other` runs as a whole in the middle of `first`'s call, which gets it as callback."""
    raised = []

    def callback(pipe, index, timestep, tensors):
        if index == step:
            try:
                in_thread(other)
            except BaseException as error:
                raised.append(error)
        return {}

    made = in_thread(first, callback)
    for error in raised:
        raise error
    return made
