"""Drawn token ids and policies: roles and plans against loops."""

from __future__ import annotations

import math

import torch
from hypothesis import given, reject
from hypothesis import strategies as st

from memkern import Edit, Policy, Role, lower, token_roles
from memkern.policy import exclude, keep, logit_bias, logit_scale, replace, strength, zero

SOT, EOT = 49406, 49407


@st.composite
def windows(draw, most=3):
    """Ids of one to three windows; pads are EOT or "!"; a prompt may hold EOT, "!" and added tokens."""
    rows = []
    for _ in range(draw(st.integers(1, most))):
        words = draw(st.lists(st.sampled_from([5, 0, 256, 49408, 50000, EOT]), max_size=75))
        row = [SOT, *words, EOT]
        rows += row + [draw(st.sampled_from([EOT, 0]))] * (77 - len(row))
    return rows


ACTIONS = st.one_of(
    st.sampled_from([keep(), zero(), exclude(), replace("sot"), replace("pad-mean")]),
    st.floats(0, 1).map(strength),
    st.floats(-3, 3).map(logit_bias),
    st.floats(0, 3).map(logit_scale),
)
EDITS = st.builds(
    Edit,
    role=st.sampled_from(["prompt", "eot", "pad"]),
    action=ACTIONS,
    branch=st.sampled_from(["cond", "both"]),
    fraction=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]),
    order=st.sampled_from(["first", "last", "even", "random"]),
    seed=st.integers(0, 3),
)


def letters(ids):
    """The role of each position, one window and position at a time."""
    found = []
    for start in range(0, len(ids), 77):
        window = ids[start : start + 77]
        eot = window.index(EOT)
        found += [Role.SOT] + [Role.PROMPT] * (eot - 1) + [Role.EOT] + [Role.PAD] * (76 - eot)
    return found


@given(ids=windows())
def test_roles(ids):
    assert token_roles(torch.tensor([ids]))[0].tolist() == letters(ids)


@given(ids=windows(), edits=st.lists(EDITS, max_size=3))
def test_plans(ids, edits):
    """An edit takes as many positions as its fraction says, and later edits win."""
    try:
        policy = Policy(edits)
    except ValueError:
        reject()  # an edit that a later one makes void is refused
    roles = letters(ids)
    plan = lower(policy, token_roles(torch.tensor([ids])), "cond")
    expected = [[place, 1.0, 1.0, 0.0] for place in range(len(ids))]
    for edit in edits:
        places = [place for place, role in enumerate(roles) if role == edit.role]
        d, count = len(places), int(min(len(places), len(places) * edit.fraction))
        if edit.order == "first":
            taken = places[:count]
        elif edit.order == "last":
            taken = places[d - count :]
        elif edit.order == "even":
            taken = [places[i] for i in range(d) if (i + 1) * count // max(1, d) > i * count // max(1, d)]
        else:
            draws = torch.rand(len(ids), generator=torch.Generator().manual_seed(edit.seed)).tolist()
            taken = sorted(places, key=lambda place: draws[place])[:count]
        for place in taken:
            _apply(expected[place], edit.action, place, ids, roles)
    for place, (source, scale, factor, bias) in enumerate(expected):
        assert int(plan.source[0, place]) == source
        assert float(plan.v_scale[0, place]) == torch.tensor(scale).item()
        torch.testing.assert_close(plan.k_scale[0, place], torch.tensor(scale) * torch.tensor(factor))
        assert float(plan.bias[0, place]) == torch.tensor(bias).item() or bias == -math.inf


def _apply(key, action, place, ids, roles):
    window = place // 77
    if action.kind == "exclude":
        key[3] = -math.inf
    elif action.kind == "logit_bias":
        key[3] = (torch.tensor(key[3]) + action.value).item()
    elif action.kind == "logit_scale":
        key[2] = (torch.tensor(key[2]) * action.value).item()
    elif action.kind == "replace" and action.source is Role.SOT:
        key[:2] = [77 * window, 1.0]
    elif action.kind == "replace":
        if Role.PAD in roles[77 * window : 77 * window + 77]:
            key[:2] = [len(ids) + window, 1.0]
    else:
        key[:2] = [place, {"keep": 1.0, "zero": 0.0}.get(action.kind, 1.0 - (action.value or 0.0))]
