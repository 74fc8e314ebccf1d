"""torch's defaults belong to the user: every tensor that memkern makes names its dtype and its device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memkern

TESTS = Path(__file__).parents[1]
SUITE = ["test_coalesce.py", "pipelines/test_probe.py"]
WHOLE = [*SUITE, "pipelines/test_equal_rows.py", "pipelines/test_kv.py"]
POLICIES = ["none", "swap-pad-zero-eot", "zero-pad:0.7", "prompt-eot-from-pad", "ren", "guard:0.5,1"]


def image(pipe):
    generator = torch.Generator("cpu").manual_seed(0)
    return pipe("a cat", num_inference_steps=3, output_type="latent", generator=generator).images


@pytest.mark.parametrize("policy", POLICIES)
def test_g14_the_image_is_the_same_under_a_default_dtype(sd1, policy):
    with memkern.patched(sd1, policy):
        expected = image(sd1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with memkern.patched(sd1, policy):
            found = image(sd1)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("suite", [SUITE, pytest.param(WHOLE, marks=pytest.mark.slow)], ids=["part", "whole"])
@pytest.mark.parametrize("default", ["bfloat16", "meta"])
def test_g14_g15_the_suite_passes_under_other_defaults(default, suite):
    """The defaults are in force in memkern's own calls of torch: see tests/defaults.py."""
    environment = os.environ | {"MEMKERN_DEFAULTS": default, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "defaults", "-p", "no:cacheprovider", "-x", "-k", "not sd2"]
    marks = "not (slow or interpreter or aot or host_cuda or gpu)"
    done = subprocess.run(
        [*command, "-m", marks, *(str(TESTS / name) for name in suite)],
        cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
