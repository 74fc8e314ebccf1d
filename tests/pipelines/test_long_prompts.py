"""Prompts of several windows, as compel and sd_embed make them: each window has its own SOT and EOT."""

from __future__ import annotations

import pytest
import torch
from by_hand import SWAPS, edit
from compel import Compel

import memkern

LONG = "a photograph of an astronaut riding a horse on the moon, " * 9
SHORT = "a cat"


def windows(pipe, text):
    """Ids as sd_embed groups them: 75 tokens between SOT and EOT, the last window filled up with EOT."""
    tokenizer = pipe.tokenizer
    ids = tokenizer(text, truncation=False).input_ids[1:-1]
    groups = [ids[start : start + 75] for start in range(0, max(1, len(ids)), 75)]
    rows = []
    for group in groups:
        row = [tokenizer.bos_token_id, *group, tokenizer.eos_token_id]
        rows.append(row + [tokenizer.eos_token_id] * (77 - len(row)))
    return torch.tensor(rows)


def sd_embed(pipe, text, count):
    """A call of the text encoder for each window, side by side; shorter prompts are filled up with empty windows."""
    rows = windows(pipe, text)
    rows = torch.cat([rows, *[windows(pipe, "")] * (count - len(rows))])
    return torch.cat([pipe.text_encoder(row[None])[0] for row in rows], 1), rows.view(1, -1)


def by_hand(pipe, text, count, policy, *, edited):
    """The same with the paper's edits, window by window."""
    parts = []
    rows = windows(pipe, text)
    for row in [*rows, *[windows(pipe, "")[0]] * (count - len(rows))]:
        eot = row.tolist().index(pipe.tokenizer.eos_token_id)
        if policy in SWAPS:
            row = row.clone()
            row[eot + 1 :] = 0
        hidden = pipe.text_encoder(row[None])[0][0]
        parts.append(edit(hidden, eot, policy) if edited else hidden)
    return torch.cat(parts)[None]


@torch.no_grad()
@pytest.mark.parametrize("policy", ["swap-pad-zero-eot", "zero-eot-pad", "pad-from-eot"])
def test_c11_windows_of_sd_embed(sd1, policy):
    expected = by_hand(sd1, LONG, 2, policy, edited=True), by_hand(sd1, SHORT, 2, policy, edited=False)
    patch = memkern.patch(sd1, policy)
    found = []
    for branch, text in (("cond", LONG), ("uncond", SHORT)):
        with patch.encoding(branch) as edited:
            found.append(edited(sd_embed(sd1, text, 2)[0]))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    sd1(prompt_embeds=found[0], negative_prompt_embeds=found[1], num_inference_steps=2, output_type="latent")


@torch.no_grad()
@pytest.mark.parametrize("policy", ["zero-eot-pad", "zero-pad:0.7"])
def test_embeddings_made_without_the_pipeline(sd1, policy):
    embeds, ids = sd_embed(sd1, LONG, 2)
    expected = by_hand(sd1, LONG, 2, policy, edited=True) if policy == "zero-eot-pad" else None
    made = memkern.apply_policy(embeds, ids, policy)
    if expected is not None:
        assert torch.equal(made, expected)
    memkern.patch(sd1, policy)
    negative, _ = sd_embed_of_unpatched(sd1, SHORT, 2)
    sd1(prompt_embeds=made, negative_prompt_embeds=negative, num_inference_steps=2, output_type="latent")


def sd_embed_of_unpatched(pipe, text, count):
    patch = memkern.patch(pipe, memkern.status(pipe).policy)
    with patch.encoding("uncond"):
        return sd_embed(pipe, text, count)


@torch.no_grad()
@pytest.mark.parametrize("stage", ["embeds", "kv"])
def test_c11_compel_with_weights_and_unequal_lengths(sd1, stage):
    compel = Compel(tokenizer=sd1.tokenizer, text_encoder=sd1.text_encoder, truncate_long_prompts=False)
    patch = memkern.patch(sd1, "zero-pad:0.7", stage=stage)
    weighted = LONG.replace("astronaut", "(astronaut)1.3", 1)
    with patch.encoding("cond") as edited:
        cond = compel.build_conditioning_tensor(weighted)
        ids = compel.conditioning_provider.get_token_ids_and_expand_weights([LONG], [1.0], device="cpu")[0][None]
        with pytest.raises(ValueError, match=r"was called \d+ times.*edited\(embeds, input_ids\)"):
            edited(cond)
        cond = edited(cond, ids)
    with patch.encoding("uncond") as edited:
        uncond = compel.build_conditioning_tensor("bad picture")
        _, uncond = compel.pad_conditioning_tensors_to_same_length([cond, uncond])
        uncond = edited(uncond, torch.tensor([sd1.tokenizer("bad picture", padding="max_length").input_ids]))
    roles = memkern.token_roles(ids)
    if stage == "embeds":
        pads = [(roles[0, start : start + 77] == memkern.Role.PAD).nonzero().flatten() + start for start in (0, 77)]
        every = torch.cat(pads)
        zeroed = every[: int(len(every) * 0.7)]
        assert (cond[0, zeroed] == 0).all()
        assert (cond[0, every[len(zeroed) :]] != 0).any(-1).all()
    assert uncond.shape == cond.shape
    sd1(prompt_embeds=cond, negative_prompt_embeds=uncond, num_inference_steps=2, output_type="latent")
