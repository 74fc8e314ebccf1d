"""Token roles and padding positions, on CLIP's real ids."""

from __future__ import annotations

import pytest
import torch
from prompts import published_prompts

from memkern import Role, token_roles
from memkern.roles import CLIP_EOT_ID, padding_positions

SOT_ID = 49406


def ids_of(tokenizer, *prompts):
    return tokenizer(list(prompts), padding="max_length", max_length=77, truncation=True, return_tensors="pt")


def letters(roles):
    """S, P, E and - for the roles of one row."""
    return "".join("SPE-"[role] for role in roles.tolist())


@pytest.mark.parametrize("pad_id", [CLIP_EOT_ID, 0])
@pytest.mark.parametrize("words", [0, 1, 10, 74, 75])
def test_by_hand(pad_id, words):
    row = [SOT_ID, *range(1000, 1000 + words), CLIP_EOT_ID]
    row += [pad_id] * (77 - len(row))
    assert letters(token_roles(torch.tensor([row]))[0]) == "S" + "P" * words + "E" + "-" * (75 - words)


def test_c1_same_roles_under_both_paddings(tokenizers):
    sd1, sd2 = (ids_of(tokenizers[name], "a cat").input_ids for name in ("sd1", "sd2"))
    assert not torch.equal(sd1, sd2)
    for ids in (sd1, sd2):
        assert letters(token_roles(ids)[0]) == "SPPE" + "-" * 73


def test_c2_an_exclamation_mark_is_prompt(tokenizers, family):
    ids = ids_of(tokenizers[family], "hi!").input_ids
    assert ids[0, 2].item() in (0, 256)
    assert letters(token_roles(ids)[0]) == "SPPE" + "-" * 73


@pytest.mark.parametrize("words", [75, 76, 200])
def test_c18_no_pad_in_a_full_window(tokenizers, family, words):
    ids = ids_of(tokenizers[family], "cat " * words).input_ids
    assert letters(token_roles(ids)[0]) == "S" + "P" * 75 + "E"


def test_c17_empty_prompt(tokenizers, family):
    assert letters(token_roles(ids_of(tokenizers[family], "").input_ids)[0]) == "SE" + "-" * 75


def test_roles_follow_the_first_literal_eot(tokenizers, family):
    ids = ids_of(tokenizers[family], "a <|endoftext|> cat").input_ids
    assert letters(token_roles(ids)[0]) == "SPE" + "-" * 74


def test_c9_added_tokens_have_ids_above_eot():
    row = [SOT_ID, 49408, 49409, 320, 49500, CLIP_EOT_ID] + [CLIP_EOT_ID] * 71
    assert letters(token_roles(torch.tensor([row]))[0]) == "SPPPPE" + "-" * 71


def test_c11_windows_have_their_own_roles():
    first = [SOT_ID, *[5] * 75, CLIP_EOT_ID]
    second = [SOT_ID, 5, CLIP_EOT_ID, *[CLIP_EOT_ID] * 74]
    roles = token_roles(torch.tensor([first + second]))
    assert roles.dtype == torch.uint8
    assert roles.shape == (1, 154)
    assert letters(roles[0]) == "S" + "P" * 75 + "E" + "SPE" + "-" * 74


def test_published_prompts(tokenizers, family):
    """The roles against a scan of each row, one id at a time."""
    prompts = published_prompts(400) or ["a cat", "hi!", ""]
    ids = ids_of(tokenizers[family], *prompts).input_ids
    for row, roles in zip(ids.tolist(), token_roles(ids), strict=True):
        eot = row.index(CLIP_EOT_ID)
        expected = [Role.SOT] + [Role.PROMPT] * (eot - 1) + [Role.EOT] + [Role.PAD] * (76 - eot)
        assert roles.tolist() == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "hi!",
        "",
        "!!! !",
        "cat " * 100,
        "a <|endoftext|> cat",
        "a <|endoftext|>",
        "<|endoftext|> !",
        "a ! <|endoftext|> !",
    ],
)
def test_padding_is_what_the_tokenizer_added(tokenizers, family, prompt):
    tokenizer = tokenizers[family]
    made = ids_of(tokenizer, prompt)
    roles = token_roles(made.input_ids)
    arguments = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": CLIP_EOT_ID}
    with_mask = padding_positions(made.input_ids, roles, attention_mask=made.attention_mask, **arguments)
    assert torch.equal(with_mask, made.attention_mask == 0)
    without = padding_positions(made.input_ids, roles, **arguments)
    if family == "sd1" and prompt.endswith("<|endoftext|>"):
        # The ids are those of the prompt without it: only the mask can tell.
        assert torch.equal(made.input_ids, ids_of(tokenizer, prompt.removesuffix("<|endoftext|>")).input_ids)
    else:
        assert torch.equal(without, with_mask)


def test_empty_batch_and_short_sequences():
    assert token_roles(torch.empty(0, 77, dtype=torch.int64)).shape == (0, 77)
    assert letters(token_roles(torch.tensor([[SOT_ID, 5, CLIP_EOT_ID]], dtype=torch.int32))[0]) == "SPE"


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[1, 2]], TypeError, r"input_ids: expected an integer tensor \[B, L\], got list"),
        (torch.zeros(1, 77), TypeError, "input_ids: expected an integer tensor .* got dtype torch.float32"),
        (torch.zeros(77, dtype=torch.int64), ValueError, r"input_ids: expected shape \[B, L\], got \[77\]"),
        (torch.zeros(1, 100, dtype=torch.int64), ValueError, "length 100 is not a whole number of windows of 77"),
        (
            torch.tensor([[SOT_ID, CLIP_EOT_ID, 0], [SOT_ID, 5, 5]]),
            ValueError,
            r"input_ids: row 1, window 0 has no end-of-text token \(id 49407\)",
        ),
        (
            torch.tensor([[SOT_ID, *[CLIP_EOT_ID] * 76, SOT_ID, *[0] * 76]]),
            ValueError,
            "row 0, window 1 has no end-of-text token",
        ),
        (torch.tensor([[CLIP_EOT_ID, 5, 5]]), ValueError, "row 0, window 0 has no end-of-text token"),
    ],
)
def test_refusals(ids, error, message):
    with pytest.raises(error, match=message):
        token_roles(ids)
