"""Every case of `cases.md` has a test named after it, or a line that says why not."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def listed(name):
    """The ids of a table's first column."""
    cells = re.findall(r"^\| ((?:[A-G]\d+(?:, )?)+) \|", (TESTS / name).read_text("utf-8"), re.MULTILINE)
    return [case.lower() for cell in cells for case in cell.split(", ")]


def test_every_case_is_tested_or_explained():
    names = [
        name for path in TESTS.rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
    ]
    tested = {found for name in names for found in re.findall(r"(?<=_)([a-g]\d+)(?=_)", name)}
    known, explained = listed("cases.md"), set(listed("cases_not_applicable.md"))
    assert len(known) == len(set(known)) == 93
    assert set(known) - tested - explained == set()
    assert (tested | explained) - set(known) == set(), "an id that the page does not explain"
    assert tested & explained == set(), "a case that is tested needs no excuse"
