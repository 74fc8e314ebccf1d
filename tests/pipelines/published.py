"""The paper's published code, flag by flag, and the method here that is the same.

`python tests/pipelines/published.py` generates with both, and writes the table of their largest differences.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]

from by_hand import context, tokenize  # noqa: E402
from kv_by_hand import install, ren, roles_of  # noqa: E402
from unet_input import recorded  # noqa: E402

from memkern import demo  # noqa: E402
from memkern.audit.images import Job, generate  # noqa: E402
from memkern.audit.methods import method  # noqa: E402
from memkern.audit.prompts import Prompt  # noqa: E402
from memkern.audit.protocol import protocol, scheduler_class  # noqa: E402

PAGE = HERE.parents[1] / "docs" / "published.md"
FLAGS = {
    "--pad_token_fix_and_eot_masked True": "swap-pad-zero-eot",
    "--pad_masked_by_ratio 0.7": "zero-pad:0.7",
    "--pad_masked_by_ratio 0.4": "zero-pad:0.4",
    "--pad_token_fix True": "swap-pad",
    "--eot_pad_masked True": "zero-eot-pad",
    "--pr_replaced_with_eot True": "prompt-from-eot",
    "--pr_masked True": "zero-prompt",
    "--pad_replaced_with_eot True": "pad-from-eot",
    "--pr_pad_replaced_with_eot True": "prompt-pad-from-eot",
    "--eot_masked True": "zero-eot",
    "--pr_eot_replaced_with_pad True": "prompt-eot-from-pad",
    "--pad_masked True": "zero-pad:1",
    "--optim_target_loss 3": "wen:3",
    "--rescale_attention 1.25": "ren:1.25",
    "--rescale_attention 1.25, mask_length_minis1": "ren:1.25,1",
    "--prompt_aug_style rand_numb_add": "random-numbers:1",
    "--prompt_aug_style rand_word_add": "random-tokens:1",
}
"""Flag of the published code → method here."""
SEEDS = (0, 1)
CHANGED_TEXT = ("random-numbers", "random-tokens")


@dataclass(frozen=True)
class Difference:
    """The largest differences: of the context that reaches the UNet, and of the image in levels of 255."""

    context: float = 0.0
    image: int = 0

    def larger(self, other: Difference) -> Difference:
        """The larger of each."""
        return Difference(max(self.context, other.context), max(self.image, other.image))


def loaded():
    """The embedded model with DDIM, its bar off."""
    pipe = demo.load()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_class("DDIM").from_config(pipe.scheduler.config)
    return pipe


def wen_by_hand(pipe, text, seed, target, steps):
    """The published loop: AdamW on the embedding, SOT's gradient zeroed, the generation's own latents.

    Returns the embedding and the negative prompt's, [1, 77, C], and the magnitude at each step of the loop.
    """
    with torch.no_grad():
        cond, uncond = pipe.encode_prompt(text, "cpu", 1, True)[:2]
    pipe.scheduler.set_timesteps(steps)
    t = pipe.scheduler.timesteps[0]
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) * pipe.scheduler.init_noise_sigma
    x = pipe.scheduler.scale_model_input(torch.cat([x, x]), t)
    embeds = cond[[-1]].clone().detach()
    embeds.requires_grad = True
    optimizer = torch.optim.AdamW([embeds], lr=0.05)
    losses = []
    for _ in range(10):
        noise = pipe.unet(x, t, encoder_hidden_states=torch.cat([uncond[[0]], embeds]), return_dict=False)[0]
        noise_uncond, noise_text = noise.chunk(2)
        loss = torch.norm(noise_text - noise_uncond, p=2).mean()
        losses.append(loss.item())
        if losses[-1] <= target:
            break
        (embeds.grad,) = torch.autograd.grad(loss, [embeds])
        embeds.grad[:, [0]] = embeds.grad[:, [0]] * 0
        optimizer.step()
        optimizer.zero_grad()
    return embeds.detach(), uncond, losses


@torch.no_grad()
def by_hand(pipe, name, text, seed, options):
    """The context [2, 77, C], the negative prompt's first, and the image of the published procedure."""
    kind, _, numbers = name.partition(":")
    if kind == "wen":
        with torch.enable_grad():
            embeds, negative, _ = wen_by_hand(pipe, text, seed, float(numbers), options["num_inference_steps"])
        both = torch.cat([negative, embeds])
    else:
        both = context(pipe, [text], name)
    if kind == "ren":
        factor, _, without_eot = numbers.partition(",")
        (eot,) = roles_of(pipe, [text])
        unet = copy.deepcopy(pipe.unet)
        pipe = type(pipe)(**pipe.components | {"unet": unet}, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        install(pipe, ren([eot - bool(without_eot)], 1, float(factor)))
    generator = torch.Generator().manual_seed(seed)
    image = pipe(prompt_embeds=both[1:], negative_prompt_embeds=both[:1], generator=generator, **options).images[0]
    return both, image


def here(pipe, name, text, seed, options):
    """The context [2, 77, C] and the image of the method, and the text that it generated from."""
    found = method(name)
    with found.installed(pipe), recorded(pipe) as contexts:
        (image,), (record,) = generate(pipe, [Job(found, Prompt("0", text), seed)], options, "cpu")
    return contexts[-1], image, record["text"]


def difference(pipe, name, text, seed, options) -> Difference:
    """How far the method's context and image are from the published procedure's."""
    ours, image, used = here(pipe, name, text, seed, options)
    if name.partition(":")[0] in CHANGED_TEXT:
        assert is_published_addition(pipe.tokenizer, name, text, used), used
    else:
        assert used == text
    theirs, expected = by_hand(pipe, name, used, seed, options)
    levels = np.abs(np.asarray(image, int) - np.asarray(expected, int))
    return Difference((ours - theirs).abs().max().item(), int(levels.max()))


def is_published_addition(tokenizer, name, text, used) -> bool:
    """True if `used` is `text` with one number below 100,000, or one decoded token, between two of its words."""
    words = text.split(" ")
    for place in range(len(words) + 1):
        before, after = " ".join([*words[:place], ""]), " ".join(["", *words[place:]])
        if len(before) + len(after) <= len(used) and used.startswith(before) and used.endswith(after):
            added = used[len(before) : len(used) - len(after)]
            if name.startswith("random-numbers"):
                return added.isdigit() and str(int(added)) == added and int(added) < 100_000
            return bool(added) and "<|" not in added
    return False


def prompts(pipe) -> list[str]:
    """Two memorized captions, an ordinary one, a short one, an empty one, and one without any pad."""
    long = " ".join(["circle"] * 80)
    assert tokenize(pipe.tokenizer, [long], False)[1] == [76]
    return [*(text for text, _ in demo.memorized()[:2]), demo.ordinary()[0], "circle", "", long]


def render(found: dict[str, Difference]) -> str:
    """The page."""
    lines = [
        "# The published code, flag by flag",
        "",
        "Made by `python tests/pipelines/published.py`: on the embedded model, with the settings of",
        "`memkern audit --protocol kim-no` (DDIM, float32, 50 steps, guidance 7.5; two of its seeds), each method of",
        "`memkern audit` against the procedure of the paper's code, written out without memkern. The prompts are two",
        "memorized captions, an ordinary one, a single word, an empty prompt, and one that leaves no room for pads.",
        "",
        "*context*: the largest difference between the values that reach the UNet. *image*: the largest difference of",
        "any pixel's channel, of 255 levels. The context is the same to the bit unless a mean is computed; images",
        "differ by rounding, since a patched pipeline's attention sums in another order.",
        "",
        "| published flag | method | context | image |",
        "| --- | --- | ---: | ---: |",
        *(
            f"| `{flag}` | `{name}` | {f'{found[flag].context:.1e}' if found[flag].context else '0'} "
            f"| {found[flag].image} |"
            for flag, name in FLAGS.items()
        ),
        "",
        "`wen` starts from the latents of the generation, where the published script draws others for its loop.",
        "`random-numbers` and `random-tokens` draw from a generator of their own, so their texts are not those of the",
        "script; the table compares what is made of the same text. `--rescale_attention` leaves the embeddings alone",
        "and changes the attention. `mask_length_minis1` is a flag of Ren et al.'s code, which the paper's code sets",
        "to false.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare every flag, and write the page."""
    torch.set_num_threads(2)
    chosen = protocol("kim-no")
    options = {"num_inference_steps": chosen.steps, "guidance_scale": chosen.guidance}
    pipe = loaded()
    found = {}
    for flag, name in FLAGS.items():
        found[flag] = Difference()
        for text in prompts(pipe):
            for seed in SEEDS:
                found[flag] = found[flag].larger(difference(pipe, name, text, seed, options))
        print(flag, name, found[flag], flush=True)
    PAGE.write_text(render(found), encoding="utf-8")


if __name__ == "__main__":
    main()
