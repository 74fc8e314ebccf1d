"""Every reported case has a test named after it, or a line that says why not."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
CASES = {
    "a": (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 14, 15, 16, 17, 18, 19, 21),
    "b": (1, 2, 4, 5, 8, 9, 10, 12),
    "c": (1, 2, 3, 5, 6, 9, 10, 11, 13, 15, 17, 18, 21),
    "d": (1, 2, 3, 4, 6, 8, 9, 10, 11, 13, 15, 17, 18, 19),
    "e": (1, 3, 4),
    "f": (1, 2, 3, 6),
    "g": (
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
        11,
        12,
        13,
        14,
        15,
        16,
        17,
        18,
        19,
        20,
        21,
        22,
        23,
        24,
        25,
        26,
        27,
        28,
        29,
        31,
        33,
        34,
        35,
    ),
}
LATER = {"g30"}
"""Known and not yet dealt with: whoever does moves the id up."""


def test_every_case_is_tested_or_explained():
    names = [
        name for path in TESTS.rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
    ]
    tested = {found for name in names for found in re.findall(r"(?<=_)([a-g]\d+)(?=_)", name)}
    listed = re.findall(r"^\| ([A-G]\d+) \|", (TESTS / "cases_not_applicable.md").read_text("utf-8"), re.MULTILINE)
    explained = {name.lower() for name in listed}
    known = {f"{letter}{number}" for letter, numbers in CASES.items() for number in numbers}
    assert known - tested - explained == set()
    assert known & LATER == set(), "a case that is dealt with is not one for later"
    assert tested & LATER == set(), "a case that is tested belongs among the known"
    assert tested & explained == set(), "a case that is tested needs no excuse"
