"""The paper's procedure, written out with plain indexing: what `patch` must equal.

Nothing of memkern is used here. The swap follows the paper's code: another pad token in the tokenizer, then
everything is encoded with it; the ids that padding gets are those where the tokenizer's mask is 0.
"""

from __future__ import annotations

import torch

SWAPS = ("swap-pad-zero-eot", "swap-pad")
PRESETS = [
    "swap-pad-zero-eot",
    "swap-pad",
    "zero-pad:0.7",
    "zero-pad:0.4",
    "zero-pad:1",
    "zero-pad-last:0.9",
    "zero-eot",
    "zero-eot-pad",
    "zero-prompt",
    "prompt-from-eot",
    "pad-from-eot",
    "prompt-pad-from-eot",
    "prompt-eot-from-pad",
    "none",
]
"""The presets that edit embeddings."""


def tokenize(tokenizer, prompts, swap):
    """The ids to embed, [B, 77], and where each row's first EOT is."""
    made = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    ids = made.input_ids.clone()
    first_eot = [row.index(tokenizer.eos_token_id) for row in ids.tolist()]
    if swap:
        ids[made.attention_mask == 0] = 0
    return ids, first_eot


def embed(text_encoder, ids, clip_skip=None):
    """The text encoder's output."""
    if clip_skip is None:
        return text_encoder(ids)[0]
    hidden = text_encoder(ids, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
    core = getattr(text_encoder, "text_model", text_encoder)
    return core.final_layer_norm(hidden)


def edit(row, eot, policy):
    """Edit one cond row [77, D] whose first EOT is at `eot`."""
    row = row.clone()
    prompt, pads = slice(1, eot), slice(eot + 1, 77)
    d = 77 - (eot + 1)
    name, _, number = policy.partition(":")
    if name in ("swap-pad-zero-eot", "zero-eot"):
        row[eot] = 0
    elif name == "zero-pad":
        row[eot + 1 : eot + 1 + int(min(d, d * float(number)))] = 0
    elif name == "zero-pad-last":
        row[77 - int(min(d, d * float(number))) : 77] = 0
    elif name == "zero-eot-pad":
        row[eot:] = 0
    elif name == "zero-prompt":
        row[prompt] = 0
    elif name == "prompt-from-eot":
        row[prompt] = row[eot].clone()
    elif name == "pad-from-eot":
        row[pads] = row[eot].clone()
    elif name == "prompt-pad-from-eot":
        row[prompt] = row[eot].clone()
        row[pads] = row[eot].clone()
    elif name == "prompt-eot-from-pad" and d > 0:
        mean = row[pads].mean(0)
        row[prompt] = mean
        row[eot] = mean
    return row


def context(pipe, prompts, policy, negatives=None, images=1, guided=True, clip_skip=None):
    """The encoder_hidden_states that the UNet gets: uncond rows, then cond rows."""
    swap = policy in SWAPS
    ids, eots = tokenize(pipe.tokenizer, prompts, swap)
    cond = embed(pipe.text_encoder, ids, clip_skip)
    cond = torch.stack([edit(row, eot, policy) for row, eot in zip(cond, eots, strict=True)])
    cond = torch.stack([row for row in cond for _ in range(images)])
    if not guided:
        return cond
    ids, _ = tokenize(pipe.tokenizer, negatives or [""] * len(prompts), swap)
    uncond = embed(pipe.text_encoder, ids)
    uncond = torch.stack([row for row in uncond for _ in range(images)])
    return torch.cat([uncond, cond])
