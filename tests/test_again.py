"""`absorbed_attention` repeated with other hidden states: what is packed, and when the operator is called instead."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: no kernels")

from test_absorbed_attention import sample

from memkern import ops
from memkern.ops import again, backends
from memkern.ops.attention import zero_excluded
from memkern.ops.triton import absorbed_attention as absorbed
from memkern.ops.triton.launch import Launch

needs_interpreter = pytest.mark.skipif(not backends.INTERPRETING, reason="needs a process with TRITON_INTERPRET=1")


class Compiled:
    """A launch as Triton returns it, which is launched by its arguments in order."""

    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        assert len(grid) == 3
        assert tuple(self.launch.grid) == grid[: len(self.launch.grid)]
        return self.launch.kernel[grid]


@pytest.mark.interpreter
@needs_interpreter
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_repetition_is_the_operator_of_other_hidden_states(monkeypatch, with_bias):
    x, a, bias, vo, out_bias, _ = sample(2, 24, 64, 2, 12)
    vo, out_bias = zero_excluded(vo, bias if bias.dim() == 3 else bias.unsqueeze(1)), out_bias if with_bias else None
    launch = Launch.run

    def run(self):
        launch(self)
        return Compiled(self)

    monkeypatch.setattr(Launch, "run", run)
    repeated = absorbed.repeated(x, a, bias, vo, out_bias)
    monkeypatch.undo()
    kept = []
    for _ in range(2):
        other = torch.randn_like(x)
        kept.append((repeated(other), ops.absorbed_attention(other, a, bias, vo, out_bias, zeroed=True)))
    for made, expected in kept:
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@needs_interpreter
def test_the_interpreter_repeats_nothing():
    x, a, bias, vo, out_bias, _ = sample(2, 24, 64, 2, 12)
    assert absorbed.repeated(x, a, bias, vo, out_bias) is None


@pytest.fixture
def served(monkeypatch):
    """An operator that Triton would serve, before anything is checked."""
    monkeypatch.setattr(again, "_checked", {})
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.setattr(again.Again, "_serves", lambda self, x: again._checked.get(x.device, True))
    x, a, bias, vo, out_bias, _ = sample(2, 24, 64, 2, 12)
    vo = zero_excluded(vo, bias if bias.dim() == 3 else bias.unsqueeze(1))

    def operator(x):
        return ops.absorbed_attention(x, a, bias, vo, out_bias, zeroed=True)

    return again.Again(a, bias, vo, out_bias, "auto"), operator, x


@torch.no_grad()
def test_launches_take_the_operators_place_from_the_second_call_on(served, monkeypatch):
    repeated, operator, x = served
    calls = []

    def kept(x, *arguments):
        def launch(x):
            calls.append(x)
            return operator(x)

        return launch

    monkeypatch.setattr(absorbed, "repeated", kept)
    assert torch.equal(repeated(x), operator(x))
    calls.clear()  # the comparison
    other = torch.randn_like(x)
    assert torch.equal(repeated(other), operator(other))
    assert [id(one) for one in calls] == [id(other)]
    # Calls that the launches were not packed for go through the operator.
    strided = torch.randn(*x.shape[:2], 2 * x.shape[2])[..., ::2]
    misaligned = torch.randn(x.numel() + 1)[1:].view(x.shape)
    for one in (strided, misaligned, torch.randn(x.shape[0], 2 * x.shape[1], x.shape[2])):
        assert torch.equal(repeated(one), operator(one))
    with torch.enable_grad():
        assert torch.equal(repeated(x), operator(x))
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda x: torch.zeros_like(x), "they differ"),
        (TypeError("the launcher takes 3 more arguments"), "takes 3 more arguments"),
        (NotImplementedError("too many keys"), ""),
    ],
)
def test_where_launches_cannot_be_repeated_the_operator_stays(served, monkeypatch, caplog, fault, said):
    repeated, operator, x = served

    def kept(*arguments):
        if isinstance(fault, Exception):
            raise fault
        return fault

    monkeypatch.setattr(absorbed, "repeated", kept)
    with caplog.at_level(logging.WARNING, logger="memkern"):
        for _ in range(3):
            assert torch.equal(repeated(x), operator(x))
    assert len(caplog.records) == bool(said)
    assert said in caplog.text
