"""Fixtures of timed paths: values of the test's own instead of times, and an empty log."""

from __future__ import annotations

import logging

import pytest

from memkern.ops import backends
from memkern.pipelines.attention.clock import Clock


@pytest.fixture
def logged(monkeypatch, caplog):
    """A log that is empty, as in a new process."""
    monkeypatch.setattr(backends, "_logged", set())
    caplog.set_level(logging.WARNING, "memkern")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def timed(monkeypatch):
    """A timing that takes a second and gives the test's values; it returns the paths that were asked for."""
    asked = []

    def compare(self, found):
        asked.append(list(found))
        self.spent = 1.0
        return {name: timed.milliseconds[name] for name in found}

    def timed():
        return asked

    timed.milliseconds = {"former": 3.0, "projected": 2.0, "absorbed": 1.0}
    monkeypatch.setattr(Clock, "compare", compare)
    return timed
