"""Cross-attention with edits, written out with loops: what the kv stage must equal. Nothing of memkern is used."""

from __future__ import annotations

import torch


class EditedByHand:
    """A processor that lets a function edit one head's keys, values and logits, one row of the batch at a time.

    `edit(layer, step, row, k, v)` returns k, v `[L, D]` and a function of the logits `[N, L]`, or None.
    """

    def __init__(self, name, edit, clock):
        self.name, self.edit, self.clock = name, edit, clock

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        rows, heads = [], attn.heads
        for row in range(q.shape[0]):
            parts = []
            per_head = (tensor[row].chunk(heads, -1) for tensor in (q, k, v))
            for q_head, k_head, v_head in zip(*per_head, strict=True):
                k_new, v_new, change = self.edit(self.name, self.clock["step"], row, k_head.clone(), v_head.clone())
                logits = q_head @ k_new.mT * attn.scale
                logits = logits if change is None else change(logits)
                parts.append(torch.nan_to_num(logits.softmax(-1)) @ v_new)
            rows.append(torch.cat(parts, -1))
        out = attn.to_out[1](attn.to_out[0](torch.stack(rows)))
        out = out + hidden_states if attn.residual_connection else out
        return out / attn.rescale_output_factor


def install(pipe, edit):
    """Put `edit` into every cross-attention layer of a pipeline, and count its steps from 0."""
    clock = {"step": -1}

    def tick(module, args):
        clock["step"] += 1

    pipe.unet.register_forward_pre_hook(tick)
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(EditedByHand(name, edit, clock))
    return pipe


def roles_of(pipe, prompts):
    """The position of each prompt's first EOT."""
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, truncation=True).input_ids
    return [row.index(pipe.tokenizer.eos_token_id) for row in ids]


def ren(eots, images, factor):
    """Ren et al.: SOT's logit times `factor` on cond rows; beyond the cond row's EOT excluded on both."""
    eots = [eot for eot in eots for _ in range(images)]

    def edit(layer, step, row, k, v):
        cond = row >= len(eots)
        eot = eots[row % len(eots)]

        def change(logits):
            logits = logits.clone()
            if cond:
                logits[:, 0] *= factor
            logits[:, eot + 1 :] = -torch.inf
            return logits

        return k, v, change

    return edit


def guard(eots, factor, threshold, first=1):
    """GUARD's attenuation on cond rows, in down and mid blocks; of the keys from `first` on: SOT is left out."""

    def edit(layer, step, row, k, v):
        if row < len(eots) or layer.startswith("up"):
            return k, v, None

        def change(logits):
            top = logits.amax(0)[first:]
            z = (top - top.mean()) / top.std(unbiased=False)
            scale = torch.ones(logits.shape[1])
            scale[first:][z > threshold] = factor
            return logits * scale

        return k, v, change

    return edit


def zero_pads(eots, where):
    """All PAD of cond rows zeroed where `where(layer, step)` is true."""

    def edit(layer, step, row, k, v):
        if row >= len(eots) and where(layer, step):
            k[eots[row - len(eots)] + 1 :] = 0
            v[eots[row - len(eots)] + 1 :] = 0
        return k, v, None

    return edit
