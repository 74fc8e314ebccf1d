"""Choices of paths: the fastest by what was timed within a budget, and estimates where nothing may be timed."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from measuring import attention, choice, files, forget

import memkern
from memkern import timings
from memkern.ops import backends
from memkern.pipelines.attention import clock, measured
from memkern.pipelines.attention.clock import Clock
from memkern.pipelines.attention.layer import Layer
from memkern.pipelines.attention.measured import Chooser, Shape, calls, rounded
from memkern.pipelines.attention.sources import unedited
from memkern.testing import SiteHolder

pytestmark = pytest.mark.skipif(bool(backends.installed("cpp")), reason="needs the compiled CPU library")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("milliseconds", "path"),
    [
        ((3.0, 2.0, 1.0), "absorbed"),
        ((3.0, 1.0, 2.0), "projected"),
        ((1.0, 2.0, 3.0), "former"),
        ((1.0, 0.98, 0.99), "former"),  # not by a margin
    ],
)
def test_the_fastest_is_taken(tmp_path, timed, milliseconds, path):
    timed.milliseconds = dict(zip(timings.PATHS, milliseconds, strict=True))
    made = choice(Chooser(True, 2, tmp_path))
    assert made.path == path
    assert f"measured in ms: former {milliseconds[0]:.2f}, projected" in str(made)


def test_a_shape_is_timed_once_and_another_process_reads(tmp_path, timed):
    first = choice(Chooser(True, 9, tmp_path))
    assert choice(Chooser(True, 9, tmp_path)) == first
    assert len(timed()) == 1
    choice(Chooser(True, 9, tmp_path), queries=24)
    assert len(timed()) == 2
    timed.milliseconds = dict.fromkeys(timings.PATHS, 1.0)
    forget()
    read = choice(Chooser(True, 9, tmp_path))
    assert len(timed()) == 2
    assert read.path == first.path
    assert "from the table, measured in ms: former 3.00" in str(read)
    assert read.times.milliseconds == first.times.milliseconds


def test_the_budget_is_a_pipelines_and_what_is_estimated_stays(tmp_path, timed):
    """A later timing, with time left, would make another image."""
    chooser = Chooser(True, 2, tmp_path)
    made = [choice(chooser, queries) for queries in (8, 16, 24)]
    assert [one.times.measured for one in made] == [True, True, False]
    assert chooser.left == 0
    assert "estimates in ms: former" in str(made[2])
    assert choice(Chooser(True, 2, tmp_path), 24) == made[2]
    forget()
    assert "from the table, estimates in ms: former" in str(choice(Chooser(True, 2, tmp_path), 24))
    assert choice(Chooser(True, 2, tmp_path, again=True), 24).times.measured
    forget()
    assert choice(Chooser(True, 2, tmp_path), 24).times.measured


def test_time_that_runs_out_midway(monkeypatch):
    """By then all paths must have been timed twice."""
    seconds = iter(range(1000))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(seconds))
    given = {"former": lambda: None, "projected": lambda: None}
    assert Clock(CPU, 1.5).compare(given) is None  # while it warms up
    assert Clock(CPU, 6).compare(given) is None
    enough = Clock(CPU, 14)
    assert enough.compare(given) == {"former": 1000.0, "projected": 1000.0}
    assert 14 <= enough.spent < 18


def test_a_processor_that_others_have(monkeypatch, logged):
    switches = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(clock, "_switches", lambda: next(switches))
    for _ in range(2):
        assert Clock(CPU, 9).compare({"former": lambda: None}) is None
    assert [message for message in logged() if "busy" in message] == [
        "memkern: the processor is busy: paths of layers are estimated, until `memkern tune` times them"
    ]


PROCESSORS = [
    AttnProcessor2_0,
    AttnProcessor,
    lambda: SlicedAttnProcessor(2),
    FusedAttnProcessor2_0,
    lambda: IPAdapterAttnProcessor2_0(32, 24),
]


@torch.no_grad()
@pytest.mark.parametrize("make", PROCESSORS, ids=["2_0", "eager", "sliced", "fused", "images"])
@pytest.mark.parametrize("projections", ["read", "called", "anew"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_timed_is_one_function_by_every_path(make, projections, dtype):
    """Timing leaves the layer and all states of random numbers as they are."""
    attn = attention(make())
    if make is FusedAttnProcessor2_0:
        attn.fuse_projections()
    before = {name: value.clone() for name, value in attn.state_dict().items()}
    modules, state = dict(attn.named_modules()), torch.get_rng_state()
    layer, context = Layer(attn, attn.processor), torch.rand(2, 77, 24)
    context[1, 13:] = 0
    shape = Shape.of(layer, torch.empty(2, 16, 32, dtype=dtype), unedited(context), 24, "auto", projections)
    assert shape.keys == ((16, 1), (77, 1))
    state = torch.get_rng_state()
    found = calls(layer, shape, CPU, list(timings.PATHS))
    made = {path: call() for path, call in found.items()}
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(attn.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in attn.state_dict().items())
    assert made["former"].shape == (2, 16, 32)
    # The former attends to all 77 rows, the others to what a sequence has left: alike where that is all.
    for path in ("projected", "absorbed"):
        torch.testing.assert_close(made[path][1], made["former"][1], atol=2e-2, rtol=2e-2)
        assert not torch.allclose(made[path][0], made["former"][0], atol=1e-6)
    torch.testing.assert_close(made["projected"], made["absorbed"], atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_under_autocast_products_are_in_its_dtype():
    layer = Layer(attention(), AttnProcessor2_0())
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(1, 16, 32)
        shape = Shape.of(layer, x, unedited(torch.rand(1, 77, 24)), 24, "auto", "read")
        made = [call() for call in calls(layer, shape, CPU, ["former", "projected", "absorbed"]).values()]
    assert "float32 as bfloat16" in str(shape)
    assert all(one.isfinite().all() for one in made)


def test_shapes_that_are_told_apart():
    attn, context = attention(), unedited(torch.rand(2, 77, 24))

    def key(queries=16, dtype=torch.float32, processor=None, projections="read", backend="auto"):
        layer = Layer(attn, processor or AttnProcessor2_0())
        return str(Shape.of(layer, torch.empty(2, queries, 32, dtype=dtype), context, 24, backend, projections))

    keys = [
        key(),
        key(queries=24),
        key(dtype=torch.float16),
        key(processor=AttnProcessor()),
        key(processor=SlicedAttnProcessor(2)),
        key(processor=SlicedAttnProcessor(4)),
        key(projections="called"),
        key(backend="cpp"),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    keys.append(key())
    torch.set_num_threads(threads)
    assert len({*keys}) == len(keys)
    assert key() == keys[0]
    readers = [(count, 1) for count in (1, 8, 9, 70, 76, 77, 0)]
    assert rounded(readers, 77) == tuple((count, 1) for count in (8, 8, 8, 16, 72, 77, 77))


def test_modes_that_count_or_make_up_what_is_computed(tmp_path, timed):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        made = choice(Chooser(True, 2, tmp_path))
    assert not made.times.measured
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not choice(Chooser(True, 2, tmp_path)).times.measured
    handle.remove()
    assert not timed()
    assert not files(tmp_path)
    assert choice(Chooser(True, 2, tmp_path)).times.measured


def test_timing_that_fails_leaves_the_estimate(tmp_path, monkeypatch, logged):
    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(measured, "calls", fail)
    for _ in range(2):
        assert not choice(Chooser(True, 2, tmp_path)).times.measured
    assert [message for message in logged() if "OutOfMemoryError: no room" in message] == logged()
    assert len(logged()) == 1


def test_estimated_looks_nothing_up(tmp_path, timed, monkeypatch):
    monkeypatch.setenv("MEMKERN_CHOICE", "estimated")
    monkeypatch.setenv("MEMKERN_CACHE", str(tmp_path))
    assert not choice(Chooser.from_environment()).times.measured
    assert not timed()
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("MEMKERN_CHOICE", "fastest", "measured or estimated"),
        ("MEMKERN_CHOICE", "", "measured or estimated"),
        ("MEMKERN_CHOICE_SECONDS", "soon", "a number of seconds such as 2"),
        ("MEMKERN_CHOICE_SECONDS", "-1", "a number of seconds such as 2"),
        ("MEMKERN_CHOICE_SECONDS", "nan", "a number of seconds such as 2"),
        ("MEMKERN_CACHE", "", "off or a folder"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_patched(sd1, monkeypatch, name, value, right):
    monkeypatch.setenv(name, value)
    own = type(sd1)
    with pytest.raises(ValueError) as raised:
        memkern.patch(sd1)
    assert str(raised.value) == f"{name}: expected {right}, got {value!r}"
    assert type(sd1) is own
    assert not memkern.status(sd1).patched


def test_a_pipeline_and_its_copies_share_a_budget(sd1, monkeypatch):
    import copy

    monkeypatch.setenv("MEMKERN_CHOICE_SECONDS", "7")
    patch = memkern.patch(sd1)
    assert patch.family.chooser.left == 7
    assert memkern.patch(copy.copy(sd1)).family.chooser is patch.family.chooser


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "path"), [(torch.float16, "projected"), (torch.bfloat16, "absorbed")])
def test_absorption_in_float16_is_estimated_as_what_it_is(dtype, path, monkeypatch):
    """A layer of SDXL whose keys make both paths about equally much work: on the CPU A and VO of float16 are float32,
    so that absorbing takes twice as long.
    """
    monkeypatch.setenv("MEMKERN_CHOICE", "estimated")
    options = {"cross_attention_dim": 64, "heads": 20, "dim_head": 64}
    layer = Attention(query_dim=1280, processor=AttnProcessor2_0(), **options).to(dtype).eval()
    holder = SiteHolder(torch.nn.ModuleDict({"attn2": layer}))
    x, context = torch.randn(2, 1024, 1280).to(dtype), torch.randn(2, 77, 64).to(dtype)
    context[:, 60:] = 0
    for _ in range(2):
        layer(x, encoder_hidden_states=context)
    assert str(holder.session.layers["attn2"]).startswith(path)
