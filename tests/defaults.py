"""A pytest plugin: torch's defaults are unusual ones wherever memkern calls torch, and the usual ones elsewhere.

    MEMKERN_DEFAULTS=bfloat16 pytest -p defaults …    # as after torch.set_default_dtype(torch.bfloat16)
    MEMKERN_DEFAULTS=meta pytest -p defaults …        # as after torch.set_default_device("meta")

A default device of "meta" for all is of no use: the tokenizers' own tensors would have no values.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._device import DeviceContext

import memkern

PACKAGE = str(Path(memkern.__file__).parent) + os.sep
USUAL = torch.float32


class Elsewhere(DeviceContext):
    """A default device for calls that memkern makes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
            return super().__torch_function__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


class Narrow(torch.overrides.TorchFunctionMode):
    """A default dtype for calls that memkern makes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
            return func(*args, **(kwargs or {}))
        torch.set_default_dtype(torch.bfloat16)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch.set_default_dtype(USUAL)


MODES = {"bfloat16": Narrow, "meta": lambda: Elsewhere(torch.device("meta"))}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with MODES[os.environ["MEMKERN_DEFAULTS"]]():
        return (yield)
