"""The error of a layer's output against float64, beside that of diffusers: the table of benchmarks/accuracy.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from operators import needs_cpp

from memkern.ops import backends, cpu
from memkern.pipelines.attention import choose
from memkern.pipelines.attention.sources import Attenuation, unedited

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from accuracy import DTYPES, LOGITS, SIZES, Case, errors, paths, ratios

MARKS = [pytest.mark.interpreter] if backends.INTERPRETING else []
PATHS = [
    pytest.param(path, dtype, marks=MARKS, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, path in paths().items()
    for dtype in DTYPES
    if not (backends.INTERPRETING and dtype == torch.bfloat16)  # computed wrongly there
]


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_g19_the_error_is_that_of_diffusers(path, dtype, logits):
    """The error is at most 1.5 times theirs for logits of any size: rounding them to 16 bits would show from 1 on."""
    error, _ = ratios(path, logits, dtype, 2, [(64, 160, 4)] if backends.INTERPRETING else SIZES)
    assert error <= 1.5


@torch.no_grad()
@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_g19_finite_beyond_what_float16_holds(path, dtype):
    case = Case((64, 64, 4), 100_000.0, dtype)
    assert case.diffusers().isfinite().all()
    assert path(case).isfinite().all()


@pytest.fixture
def narrow():
    """A float16 layer that is absorbed."""
    return Case((4096, 320, 8), 1.0, torch.float16, keys=16)


def prepared(case):
    """A patched layer's output of the case, and its path; it errs as diffusers does, also where terms cancel."""
    made = choose.prepare(case.whole, case.x, unedited(case.context), case.context, "auto")
    exact = case.in_float64()
    theirs, _ = errors(case.diffusers(), exact)
    ours, _ = errors(made.attend(case.x, case.context, None), exact)
    assert ours**0.5 <= 1.5 * theirs**0.5
    return made


@needs_cpp
@torch.no_grad()
def test_g19_queries_and_keys_multiplied_out_may_be_beyond_float16(narrow):
    """The products are kept in float32."""
    narrow.layer.to_k.weight.mul_(1e4 / narrow.layer.to_k.weight.abs().max() / 10)
    narrow.layer.to_q.weight.mul_(20 / narrow.layer.to_q.weight.abs().max())
    narrow.x.mul_(1e-4)
    k = narrow.layer.to_k(narrow.context).unflatten(-1, (8, 40)).transpose(1, 2)
    assert not (k @ narrow.layer.to_q.weight.view(8, 40, 320) * narrow.layer.scale).isfinite().all()
    assert prepared(narrow).choice.path == "absorbed"


@needs_cpp
@torch.no_grad()
def test_g19_values_multiplied_out_beyond_float16_are_projected(narrow):
    """Two heads that cancel: the output is small, what each has in it is not."""
    for name in ("to_q", "to_k", "to_v"):
        weight = getattr(narrow.layer, name).weight
        weight[40:80] = weight[:40]
    narrow.layer.to_v.weight[:80] *= 1.5e4
    narrow.layer.to_out[0].weight[:, :40] *= 60
    narrow.layer.to_out[0].weight[:, 40:80] = -narrow.layer.to_out[0].weight[:, :40]
    choice = prepared(narrow).choice
    assert choice.path == "projected"
    assert choice.reasons == ("its products overflow torch.float16",)


@needs_cpp
@pytest.mark.skipif(not cpu._serves(torch.bfloat16), reason="oneDNN has no bfloat16 here")
@torch.no_grad()
def test_g19_two_products_where_a_processor_has_tiles(monkeypatch):
    """The path for AMX; elsewhere it is as right, and slower."""
    case = Case((64, 320, 8), 100.0, torch.bfloat16)
    plain = case.absorbed()
    monkeypatch.setattr(cpu, "_has_tiles", lambda: True)
    monkeypatch.setattr(cpu, "_pack_panels", None)
    tiled = case.absorbed()
    errors = [float((out.double() - case.exact).square().mean()) for out in (tiled, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@torch.no_grad()
def test_g19_what_stands_out_is_found_by_logits_in_float32():
    """A query and a key whose product is beyond float16, and whose scale brings it back."""
    q, k = torch.full((1, 1, 2, 64), 100, dtype=torch.float16), torch.zeros(1, 1, 3, 64, dtype=torch.float16)
    k[0, 0, 1] = 100
    selected = torch.ones(1, 3, dtype=torch.bool)
    factors = Attenuation(0.5, 1.0, selected).factors(q, k, 1e-3)
    assert factors.tolist() == [[[1.0, 0.5, 1.0]]]
