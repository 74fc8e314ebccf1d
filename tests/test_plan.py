"""Plans: each preset against the table of its meaning, written out one position at a time."""

from __future__ import annotations

import itertools

import pytest
import torch

from memkern import Edit, Policy, Role, lower
from memkern.plan import pad_mean, select
from memkern.policy import exclude, keep, logit_bias, logit_scale, replace, strength, zero

L = 77


def roles_of(*prompt_lengths):
    """Rows of one window each, with that many PROMPT positions."""
    rows = [[Role.SOT] + [Role.PROMPT] * n + [Role.EOT] + [Role.PAD] * (75 - n) for n in prompt_lengths]
    return torch.tensor(rows, dtype=torch.uint8)


LENGTHS = (0, 1, 10, 17, 58, 75)
ROLES = roles_of(*LENGTHS)


@pytest.mark.parametrize("ratio", [0, 0.1, 0.29, 0.4, 0.5, 0.58, 0.7, 0.9, 1])
def test_zero_pad_counts_as_the_paper(ratio):
    plan = lower(f"zero-pad:{ratio}", ROLES, "cond")
    for row, n in enumerate(LENGTHS):
        d = 75 - n
        zeroed = int(min(d, d * ratio))
        expected = torch.ones(L)
        expected[n + 2 : n + 2 + zeroed] = 0
        assert torch.equal(plan.v_scale[row], expected)
    assert torch.equal(plan.k_scale, plan.v_scale)
    assert torch.equal(plan.source, torch.arange(L, dtype=torch.int32).repeat(len(LENGTHS), 1))
    assert (plan.bias == 0).all()


@pytest.mark.parametrize(
    ("policy", "zeroed", "replaced", "target"),
    [
        ("swap-pad-zero-eot", {Role.EOT}, set(), None),
        ("swap-pad", set(), set(), None),
        ("zero-eot", {Role.EOT}, set(), None),
        ("zero-pad:1", {Role.PAD}, set(), None),
        ("zero-eot-pad", {Role.EOT, Role.PAD}, set(), None),
        ("zero-prompt", {Role.PROMPT}, set(), None),
        ("prompt-from-eot", set(), {Role.PROMPT}, "eot"),
        ("pad-from-eot", set(), {Role.PAD}, "eot"),
        ("prompt-pad-from-eot", set(), {Role.PROMPT, Role.PAD}, "eot"),
        ("prompt-eot-from-pad", set(), {Role.PROMPT, Role.EOT}, "pad-mean"),
        ("none", set(), set(), None),
    ],
)
def test_presets(policy, zeroed, replaced, target):
    plan = lower(policy, ROLES, "cond")
    for row, n in enumerate(LENGTHS):
        for position in range(L):
            role = Role(ROLES[row, position].item())
            source = position
            if role in replaced and not (target == "pad-mean" and n == 75):  # a full window has no pad to average
                source = n + 1 if target == "eot" else L
            assert plan.source[row, position] == source
            assert plan.v_scale[row, position] == (0 if role in zeroed else 1)
    untouched = lower(policy, ROLES, "uncond")
    assert (untouched.v_scale == 1).all()
    assert torch.equal(untouched.source, torch.arange(L, dtype=torch.int32).repeat(len(LENGTHS), 1))


def test_ren():
    cond, uncond = roles_of(10, 75), roles_of(0, 3)
    plan = lower("ren:1.5", cond, "cond")
    assert (plan.k_scale[:, 0] == 1.5).all()
    assert (plan.k_scale[:, 1:] == 1).all()
    assert (plan.v_scale == 1).all()
    excluded = plan.bias == -torch.inf
    assert excluded[0].nonzero().flatten().tolist() == list(range(12, L))
    assert not excluded[1].any()
    paired = lower("ren:1.5", uncond, "uncond", cond_roles=cond)
    assert torch.equal(paired.bias, plan.bias)
    assert (paired.k_scale == 1).all()
    shorter = lower("ren:1.5,1", uncond, "uncond", cond_roles=cond)
    assert [(row == -torch.inf).nonzero().flatten().tolist() for row in shorter.bias] == [list(range(11, L)), [76]]
    with pytest.raises(ValueError, match="needed to lower 'exclude PAD on both by the roles of cond' for uncond rows"):
        lower("ren:1.5", uncond, "uncond")
    with pytest.raises(ValueError, match=r"cond_roles: expected the shape of roles, \[2, 77\], got \[1, 77\]"):
        lower("ren:1.5", uncond, "uncond", cond_roles=cond[:1])


@pytest.mark.parametrize("order", ["first", "last", "even", "random"])
@pytest.mark.parametrize("fraction", [0, 0.3, 0.5, 1])
def test_fractions(order, fraction):
    edit = Edit("pad", zero(), fraction=fraction, order=order, seed=7)
    chosen = select(edit, ROLES)
    assert not (chosen & (ROLES != Role.PAD)).any()
    for row, n in enumerate(LENGTHS):
        d = 75 - n
        picked = (chosen[row].nonzero().flatten() - (n + 2)).tolist()
        count = int(d * fraction)
        assert len(picked) == count
        if order == "first":
            assert picked == list(range(count))
        if order == "last":
            assert picked == list(range(d - count, d))
        if order == "even" and count > 1:
            gaps = {b - a for a, b in itertools.pairwise(picked)}
            assert max(gaps) - min(gaps) <= 1


def test_random_uses_its_own_seed_and_not_the_batch():
    edit = Edit("pad", zero(), fraction=0.5, order="random", seed=3)
    before = torch.random.get_rng_state()
    chosen = select(edit, ROLES)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(chosen[2:3], select(edit, ROLES[2:3]))
    assert not torch.equal(chosen, select(Edit("pad", zero(), fraction=0.5, order="random", seed=4), ROLES))


def test_windows_replace_by_their_own_rows():
    roles = torch.cat([roles_of(75), roles_of(5)], 1)  # one row of two windows
    plan = lower(Policy([Edit("prompt", replace("eot")), Edit("eot", replace("sot"))]), roles, "cond")
    assert plan.source[0, 1:76].unique().tolist() == [76]
    assert plan.source[0, 76].item() == 0
    assert plan.source[0, 78:83].unique().tolist() == [77 + 6]
    assert plan.source[0, 83].item() == 77
    mean = lower("prompt-eot-from-pad", roles, "cond")
    assert torch.equal(mean.source[0, :77], torch.arange(77, dtype=torch.int32))  # the first window has no pad
    assert mean.source[0, 78:84].unique().tolist() == [154 + 1]


def test_re_embedded_pads_follow_the_means_in_the_bank():
    roles = torch.cat([roles_of(75), roles_of(5)], 1)  # one row of two windows: L = 154, W = 2
    plan = lower(Policy([Edit("pad", replace("pad-reembedded"))]), roles, "cond")
    own = torch.arange(154, dtype=torch.int32)
    assert torch.equal(plan.source[0], torch.where(roles[0] == Role.PAD, own + 154 + 2, own))


def test_later_edits_win_and_logits_compose():
    plan = lower(
        Policy(
            [
                Edit("pad", zero()),
                Edit("pad", keep(), fraction=0.5, order="last"),
                Edit("eot", replace("sot")),
                Edit("eot", strength(0.25), fraction=0.999),  # of one position: none
                Edit("sot", logit_scale(2)),
                Edit("sot", logit_bias(0.5)),
                Edit("prompt", exclude()),
            ]
        ),
        roles_of(1),
        "cond",
    )
    assert plan.v_scale[0, 3:40].sum() == 0
    assert plan.v_scale[0, 40:].sum() == 37
    assert plan.source[0, 2] == 0
    assert plan.v_scale[0, 2] == 1
    assert plan.k_scale[0, 0] == 2
    assert plan.bias[0, :2].tolist() == [0.5, -torch.inf]


@pytest.mark.parametrize(("amount", "scale"), [(0, 1.0), (0.25, 0.75), (1, 0.0)])
def test_strength(amount, scale):
    plan = lower(Policy([Edit("pad", strength(amount))]), roles_of(3), "cond")
    assert (plan.v_scale[0, 5:] == scale).all()
    assert (plan.v_scale[0, :5] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pad_mean(dtype):
    roles = torch.cat([roles_of(75, 5), roles_of(70, 3)], 1)
    torch.manual_seed(0)
    embeds = torch.randn(2, 154, 8).to(dtype)
    embeds[:, 0] = float("nan")  # not a pad: may not leak
    mean = pad_mean(embeds, roles)
    assert mean.shape == (2, 2, 8)
    assert (mean[0, 0] == 0).all()
    exact = embeds.double()
    for row, window, first in ((0, 1, 72), (1, 0, 7), (1, 1, 5)):
        start = 77 * window
        expected = exact[row, start + first : start + 77].mean(0)
        torch.testing.assert_close(
            mean[row, window].double(), expected, atol=torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps
        )


@pytest.mark.parametrize(
    ("roles", "error", "message"),
    [
        (
            torch.zeros(1, 77),
            TypeError,
            "roles: expected dtype torch.uint8, got torch.float32; make them with token_roles",
        ),
        (torch.zeros(77, dtype=torch.uint8), ValueError, r"roles: expected shape \[B, L\], got \[77\]"),
        (None, TypeError, "roles: expected a uint8 tensor .* got NoneType"),
    ],
)
def test_refusals(roles, error, message):
    with pytest.raises(error, match=message):
        lower("zero-eot", roles, "cond")


def test_unknown_branch():
    with pytest.raises(ValueError, match="branch: expected one of cond, uncond, got 'left'"):
        lower("zero-eot", ROLES, "left")
