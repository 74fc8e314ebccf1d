"""Actions: what each kind takes, and where they are imported from."""

from __future__ import annotations

import subprocess
import sys

import pytest

from memkern import Role, actions, policy
from memkern.actions import Action, Bank, attenuate, logit_bias, number, replace, strength


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "halve"}, "kind: expected one of keep, zero, exclude, replace, .*, got 'halve'"),
        ({"kind": "zero", "value": 1.0}, "value: zero takes none, got 1.0"),
        ({"kind": "strength", "threshold": 1.0, "value": 0.5}, "threshold: strength takes none, got 1.0"),
        ({"kind": "logit_bias"}, "value: expected a finite number, got None"),
        ({"kind": "attenuate", "value": 1.0}, "threshold: expected a finite number, got None"),
        ({"kind": "replace"}, "source: expected 'sot', 'eot', or a bank: .*, got None"),
        ({"kind": "strength", "value": 2}, r"value: expected a number in \[0, 1\], got 2"),
    ],
)
def test_an_action_takes_what_its_kind_takes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Action(**arguments)


def test_equal_actions():
    assert replace("eot") == replace(Role.EOT) == Action("replace", source="eot")
    assert replace("pad-mean").source is Action("replace", source="pad-mean").source is Bank.PAD_MEAN
    assert strength(1) == Action("strength", 1)
    assert str(attenuate(0.2, -0.0)) == "attenuate(0.2, 0)"


def test_a_number_that_no_float_holds():
    with pytest.raises(ValueError, match="logit_bias: expected a number that a float can hold"):
        logit_bias(10**400)


@pytest.mark.parametrize(
    ("value", "text"), [(0.7, "0.7"), (1.0, "1"), (1e-5, "1e-05"), (1e16, "1e+16"), (-2.0, "-2"), (1 / 3, repr(1 / 3))]
)
def test_numbers(value, text):
    assert number(value) == text
    assert float(text) == value


def test_actions_are_importable_from_where_they_were():
    names = "keep zero exclude replace logit_scale logit_bias attenuate strength Action Bank REEMBEDDED_AS".split()
    assert all(getattr(policy, name) is getattr(actions, name) for name in names)
    assert set(names) <= set(policy.__all__)


@pytest.mark.parametrize("module", ["memkern.policy", "memkern.presets"])
def test_presets_are_there_whatever_is_imported_first(module):
    program = f"import {module}, memkern.policy; print(memkern.policy.Policy.parse('zero-pad'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "zero-pad:0.7"
