"""Drawn policies: two that differ never print alike, and each is what its JSON says."""

from __future__ import annotations

from hypothesis import assume, given, reject
from hypothesis import strategies as st

from memkern import Edit, Policy
from memkern.actions import (
    attenuate,
    exclude,
    keep,
    logit_bias,
    logit_scale,
    replace,
    strength,
    zero,
)

UNIT = st.sampled_from([0.0, -0.0, 0.7, 0.1 + 0.2, 0.3, 1.0, 1]) | st.floats(0, 1)
NUMBERS = st.sampled_from([0, 1, 1.25, 1.25000001]) | st.floats(allow_nan=False, allow_infinity=False)
ACTIONS = st.one_of(
    st.sampled_from([keep(), zero(), exclude(), *map(replace, ("sot", "eot", "pad-mean", "pad-reembedded"))]),
    UNIT.map(strength),
    NUMBERS.map(logit_bias),
    NUMBERS.map(logit_scale),
    st.builds(attenuate, NUMBERS, NUMBERS),
)
UNNAMED = st.none()
NAMES = st.sampled_from(["down", "mid", "64x64", "down, mid", "mid in steps 0 to 1", "'mid'", ""]) | st.text(max_size=4)


@st.composite
def edits(draw):
    bounds = sorted(draw(st.none() | st.tuples(UNIT, UNIT)) or ())
    try:
        return Edit(
            draw(st.sampled_from(["sot", "prompt", "eot", "pad"])),
            draw(ACTIONS),
            branch=draw(st.sampled_from(["cond", "uncond", "both"])),
            fraction=draw(UNIT),
            order=draw(st.sampled_from(["first", "last", "even", "random"])),
            seed=draw(st.integers(-2, 3)),
            roles_of=draw(st.sampled_from(["own", "cond"])),
            layers=draw(st.none() | st.lists(NAMES, min_size=1, max_size=3)),
            steps=tuple(bounds) or None,
        )
    except ValueError:
        reject()  # an empty part of the schedule, a role replaced by itself


@st.composite
def policies(draw, names=UNNAMED):
    token = st.none() | st.sampled_from(["!", "'", "! + zero PAD on cond"]) | st.text(min_size=1, max_size=3)
    try:
        return Policy(draw(st.lists(edits(), max_size=2)), draw(token), draw(names))
    except ValueError:
        reject()  # an edit that a later one makes void


@st.composite
def near(draw, edit):
    """The same edit except for one field, which is drawn again."""
    other = draw(edits())
    name = draw(st.sampled_from(list(vars(edit))))
    try:
        return Edit(**vars(edit) | {name: getattr(other, name)})
    except ValueError:
        reject()


@given(policies(), policies())
def test_policies_that_differ_print_differently(one, other):
    assume(one != other)
    assert str(one) != str(other)


@given(st.data(), edits())
def test_edits_that_differ_in_one_field_print_differently(data, edit):
    other = data.draw(near(edit))
    assert (str(edit) == str(other)) == (edit == other)


@given(policies(UNNAMED | st.sampled_from(["zero-pad:0.7", "none", "mine"]) | st.text(min_size=1, max_size=3)))
def test_json_is_read_back(policy):
    read = Policy.from_json(policy.to_json())
    assert (read, read.name, str(read)) == (policy, policy.name, str(policy))
    assert read.to_json() == policy.to_json()
