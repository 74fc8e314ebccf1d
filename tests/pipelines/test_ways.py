"""Every way in which people run a pipeline is protected and accelerated, or memkern says what is not and why."""

from __future__ import annotations

import pytest
from ways import LIBRARIES, QUANTIZED, STAGES, WAYS, pipelines, quantized_verdicts, verdict

LEFT = {
    "a processor of one's own": {"embeds": "keep their own processors: Unknown", "kv": "it has a Unknown"},
    "sequential offload": {"embeds": "to_k has hooks", "kv": "to_k has hooks"},
    "group offload": {"embeds": "to_k has hooks", "kv": "to_k has hooks"},
}
"""The ways that are not accelerated, with their messages."""


@pytest.fixture(scope="module")
def made():
    return pipelines()


def case(*values, slow):
    """A case that is left to `make test-slow` where another one is like it."""
    return pytest.param(*values, marks=[pytest.mark.slow] if slow else [])


COMPILED = [name for name in WAYS if "compile" in name]
MODES = [name for name in COMPILED if " under " in name or " in inference" in name]
ONCE = [name for name in WAYS if name not in (*QUANTIZED, "PAG")]
EACH = [case("SD", name, slow=name in MODES) for name in ONCE]
EACH += [case("SDXL", name, slow=name in COMPILED[1:]) for name in ONCE]
AFTER = [case(name, slow=name != COMPILED[0]) for name in COMPILED if "IP-Adapter" not in name]


def holds(found, name, stage):
    said = LEFT.get(name, {}).get(stage)
    if said is None:
        assert found.protected, found
        assert found.accelerated, found
    else:
        assert said in found.told
        assert found.protected or "refused" in found.told


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("family", "name"), EACH)
def test_each_way(made, family, name, stage):
    holds(verdict(made[family], name, stage), name, stage)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", STAGES)
def test_pag(tokenizers, stage):
    from families import sd_families

    holds(verdict(sd_families(tokenizers)["StableDiffusionPAGPipeline"], "PAG", stage), "PAG", stage)


@pytest.mark.skipif(not LIBRARIES.is_dir(), reason="libraries that quantize are not there; `make` puts them there")
def test_g13_quantized_weights_are_called():
    """The libraries themselves are used, in a process of their own."""
    found = quantized_verdicts()
    assert set(found) == {"SD", "SDXL"}
    for ways in found.values():
        assert set(ways) == set(QUANTIZED)
        for name, stages in ways.items():
            for stage, one in stages.items():
                holds(one, name, stage)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", AFTER)
def test_compiled_after_patching(made, name, stage):
    holds(verdict(made["SD"], name, stage, last=True), name, stage)
