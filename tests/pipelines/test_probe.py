"""The probe: the attention mass that a plain computation gives, on patched pipelines and others, and nothing else."""

from __future__ import annotations

import pytest
import torch
from kv_by_hand import roles_of

import memkern
from memkern.pipelines.unet.layers import cross_attention_layers
from memkern.roles import Role
from memkern.testing import tiny_pipeline

PROMPTS = ["a cat", "a photograph of an astronaut riding a horse on the moon"]


def images(pipe, steps=3, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPTS, num_inference_steps=steps, generator=generator, output_type="latent", **options).images


class Watched:
    """A processor that keeps probabilities `[B, H, N, L]`, computed with what `change` makes of a row's logits."""

    def __init__(self, name, kept, change=None):
        self.name, self.kept, self.change = name, kept, change

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = (
            split(module(x))
            for module, x in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        logits = q @ k.mT * attn.scale
        if self.change is not None:
            logits = torch.stack([self.change(row, logits[row]) for row in range(len(logits))])
        p = logits.softmax(-1)
        self.kept.setdefault(self.name, []).append(p)
        out = attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))
        out = out + hidden_states if attn.residual_connection else out
        return out / attn.rescale_output_factor


def probabilities(pipe, change=None):
    """Layer → per step what a plain computation attends to."""
    kept = {}
    for name, attn in cross_attention_layers(pipe.unet):
        attn.set_processor(Watched(name, kept, change))
    images(pipe)
    return kept


def expected_mass(pipe, kept, rows, eots):
    """Role → `[layers, steps]`, a mean over the rows of one branch."""
    total = {}
    for role in Role:
        per_layer = []
        for probability in kept.values():
            per_step = []
            for p in probability:
                shares = []
                for row, eot in zip(rows, eots, strict=True):
                    part = {0: slice(0, 1), 1: slice(1, eot), 2: slice(eot, eot + 1), 3: slice(eot + 1, 77)}[int(role)]
                    shares.append(p[row].mean((0, 1))[part].sum())
                per_step.append(torch.stack(shares).mean())
            per_layer.append(torch.stack(per_step))
        total[role] = torch.stack(per_layer)
    return total


@pytest.fixture
def plain(tokenizers):
    return tiny_pipeline(tokenizers["sd1"])


def ren(eots):
    def change(row, logits):
        logits = logits.clone()
        if row >= len(eots):
            logits[..., 0] *= 1.25
        logits[..., eots[row % len(eots)] + 1 :] = -torch.inf
        return logits

    return change


@pytest.mark.parametrize("policy", [None, "none", "ren:1.25"])
def test_mass_is_that_of_a_plain_computation(sd1, plain, policy):
    eots = roles_of(plain, PROMPTS)
    kept = probabilities(plain, ren(eots) if policy == "ren:1.25" else None)
    if policy is not None:
        memkern.patch(sd1, policy)
    with memkern.probe(sd1) as probe:
        images(sd1)
    assert set(probe.layers) == set(kept)
    assert probe.steps == 3
    order = [list(kept).index(name) for name in probe.layers]
    for branch, rows, lengths in (("cond", (2, 3), eots), ("uncond", (0, 1), [1, 1])):
        expected = expected_mass(plain, kept, rows, lengths)
        mass = probe.mass(branch)
        for role in Role:
            torch.testing.assert_close(mass[role], expected[role][order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sum(mass.values()), torch.ones_like(mass[Role.SOT]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", [None, "zero-pad:0.7", "ren:1.25", "guard:0.2,0.5"])
def test_the_image_stays_the_same_and_nothing_is_left(sd1, policy):
    if policy is not None:
        memkern.patch(sd1, policy)
    expected = images(sd1)
    processors = [attn.processor for _, attn in cross_attention_layers(sd1.unet)]
    with memkern.probe(sd1) as probe:
        assert torch.equal(images(sd1), expected)
    assert probe.records
    assert [attn.processor for _, attn in cross_attention_layers(sd1.unet)] == processors
    assert not any(module._forward_pre_hooks for _, module in cross_attention_layers(sd1.unet))
    assert memkern.status(sd1).patched == (policy is not None)
    assert torch.equal(images(sd1), expected)
    if policy is None:
        assert not sd1.unet._forward_pre_hooks
        assert not vars(sd1).get("encode_prompt")


def test_maps_are_those_of_eot(sd1, plain):
    kept = probabilities(plain)
    eots = roles_of(plain, PROMPTS)
    with memkern.probe(sd1) as probe:
        images(sd1)
    maps = probe.maps()
    first = kept["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
    assert maps.shape == (3, 8, 8)
    for step in range(3):
        expected = torch.stack([first[step][2 + i][..., eot].mean(0).view(8, 8) for i, eot in enumerate(eots)]).mean(0)
        torch.testing.assert_close(maps[step], expected, rtol=1e-4, atol=1e-6)


def test_edits_are_seen(sd1):
    """A zeroed key's attention is seen as well: it keeps its place in the softmax. An excluded one gets nothing."""
    memkern.patch(sd1, "zero-pad:1")
    with memkern.probe(sd1) as probe:
        images(sd1)
    assert (probe.mass()[Role.PAD] > 0.5).all()
    memkern.patch(sd1, "ren:1")
    with memkern.probe(sd1) as probe:
        images(sd1)
    assert (probe.mass()[Role.PAD] == 0).all()


def test_table_and_plots(sd1, tmp_path):
    with memkern.probe(sd1) as probe:
        images(sd1)
        images(sd1, steps=2)
    assert probe.steps == 3
    table = probe.table()
    assert table.splitlines()[0].startswith("| layer | cond SOT | cond PROMPT | cond EOT | cond PAD | uncond SOT |")
    assert len(table.splitlines()) == 2 + len(probe.layers) + 1
    probe.plot(tmp_path / "mass.png")
    probe.plot_maps(tmp_path / "maps.png")
    assert (tmp_path / "mass.png").stat().st_size > 1000
    assert (tmp_path / "maps.png").stat().st_size > 1000


def test_nothing_recorded(sd1, tmp_path):
    with memkern.probe(sd1) as probe:
        pass
    assert probe.steps == 0
    with pytest.raises(ValueError, match="nothing was recorded"):
        probe.plot(tmp_path / "mass.png")
    with pytest.raises(ValueError, match="no layer was called for a cond row"):
        probe.maps()


def test_an_exception_in_between(sd1):
    with pytest.raises(ZeroDivisionError), memkern.probe(sd1):
        raise ZeroDivisionError
    assert memkern.status(sd1).patched is False
    assert not sd1.unet._forward_pre_hooks
