"""Every family of pipelines: patched it is edited, with "none" it is itself, unpatched it is what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import sd_families, sdxl_families

import memkern

SD = list(sd_families({}))
SDXL = list(sdxl_families({}))
ONE_IMAGE = ("StableDiffusionAdapterPipeline", "StableDiffusionUpscalePipeline")
PLAIN_UNET = [name for name in (*SD, *SDXL) if name != "StableDiffusion3Pipeline"]


@pytest.fixture
def family(request, tokenizers):
    return {**sd_families(tokenizers), **sdxl_families(tokenizers)}[request.param]()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", [*SD, *SDXL], indirect=True)
def test_none_changes_nothing(family):
    expected = family(steps=3)
    memkern.patch(family.pipe, "none", accelerate=False)
    assert torch.equal(family(steps=3), expected)
    memkern.patch(family.pipe, "none")
    close(family(steps=3), expected)
    memkern.unpatch(family.pipe)
    assert torch.equal(family(steps=3), expected)


@pytest.mark.parametrize("policy", ["swap-pad-zero-eot", "zero-pad:0.7"])
@pytest.mark.parametrize("family", [*SD, *SDXL], indirect=True)
def test_policies_are_applied_and_taken_back(family, policy):
    before = family()
    patch = memkern.patch(family.pipe, policy)
    edited = family(num_images_per_prompt=1)
    assert (edited - before).abs().max() > 1e-4
    assert torch.equal(family(), edited)
    rows = patch.status().prompts
    assert any(row.changes != "unchanged" for row in rows if row.branch == "cond")
    memkern.unpatch(family.pipe)
    assert torch.equal(family(), before)


@pytest.mark.parametrize("family", PLAIN_UNET, indirect=True)
def test_the_kv_stage_gives_the_image_of_the_embeds_stage(family):
    # Some take as many images as prompts.
    prompts = ["a cat", "a photograph of a red house"][: 1 if family.name in ONE_IMAGE else 2]
    images = []
    for stage in ("embeds", "kv"):
        memkern.patch(family.pipe, "zero-pad:0.7", stage=stage)
        images.append(family(prompts, steps=3))
    close(*images)
    memkern.patch(family.pipe, "ren:1.25")
    assert (family(prompts, steps=3) - images[0]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["StableDiffusionControlNetPipeline, two nets"], indirect=True)
def test_a_controlnet_can_be_left_alone(family):
    memkern.patch(family.pipe, "zero-pad:0.7", stage="kv")
    assert "UNet2DConditionModel and ControlNetModel and ControlNetModel: " in str(memkern.status(family.pipe))
    both = family()
    memkern.patch(family.pipe, "zero-pad:0.7", stage="kv", controlnet=False)
    assert "UNet2DConditionModel: " in str(memkern.status(family.pipe))
    alone = family()
    assert (both - alone).abs().max() > 1e-5
    memkern.unpatch(family.pipe)
    plain = family()
    assert (plain - alone).abs().max() > 1e-5


@pytest.mark.parametrize("family", PLAIN_UNET, indirect=True)
def test_the_probe_knows_whose_rows_there_are(family):
    memkern.patch(family.pipe, "zero-pad:0.7")
    with memkern.probe(family.pipe) as probe:
        family()
    found = {row.branch for record in probe.records for row in record.rows if row is not None}
    assert "cond" in found
    assert not any(row is None for record in probe.records for row in record.rows)
    total = sum(probe.mass("cond").values())
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-4)


def test_the_page_of_compatibility_has_every_family():
    """The page's table is made by `compatibility.py`; a family that was added since is missing there."""
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    table = page.partition("\n## ")[0]
    named = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    assert set(named[2:]) == {*SD, *SDXL}
