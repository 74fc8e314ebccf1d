"""The page's settings, as a policy and as the code that reproduces its images."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..actions import strength, zero
from ..policy import Edit, Policy
from ..roles import Role
from ..scope import BLOCKS

STAGES = ("auto", "embeds", "kv")


@dataclass(frozen=True)
class Choice:
    """The page's controls.

    Attributes:
        preset: a preset's name, with numbers or without.
        share: r, the share of the pads that `zero-pad` zeroes; None takes the preset's.
        amount: the strength of what is zeroed, from 0 to 1.
        stage: "auto", "embeds" or "kv".
        blocks: of the UNet, where edits act: "down", "mid", "up"; all of them where none or all are named.
        steps: from–to, as fractions of the schedule.
        prompt, negative: texts.
        seeds: an image each.
        count: denoising steps.
        guidance: classifier-free guidance's scale.
    """

    preset: str
    share: float | None = None
    amount: float = 1.0
    stage: str = "auto"
    blocks: tuple[str, ...] = ()
    steps: tuple[float, float] = (0.0, 1.0)
    prompt: str = ""
    negative: str = ""
    seeds: tuple[int, ...] = (0, 1)
    count: int = 20
    guidance: float = 7.5

    def policy(self) -> Policy:
        """The preset's edits with the page's numbers.

        Raises:
            ValueError: there is no such preset, or one of its numbers is missing or wrong.
        """
        if self.stage not in STAGES:
            raise ValueError(f"stage: expected one of {', '.join(STAGES)}, got {self.stage!r}")
        preset = Policy.parse(self.preset)
        changed = Policy(tuple(self._changed(edit) for edit in preset.edits), preset.reembed_pads)
        return preset if changed == preset else changed

    def _changed(self, edit: Edit) -> Edit:
        if edit.action == zero() and self.amount < 1:
            edit = replace(edit, action=strength(self.amount))
        if self.share is not None and edit.role is Role.PAD and self.preset.partition(":")[0] == "zero-pad":
            edit = replace(edit, fraction=self.share)
        if self.blocks and set(self.blocks) != set(BLOCKS):
            edit = replace(edit, layers=tuple(block for block in BLOCKS if block in self.blocks))
        return edit if self.steps == (0.0, 1.0) else replace(edit, steps=self.steps)

    def options(self) -> dict[str, object]:
        """The arguments of the pipeline, without the generator."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative,
            "num_inference_steps": self.count,
            "guidance_scale": self.guidance,
        }

    def code(self, loading: str) -> str:
        """Python that generates the patched images; `loading` is the line that makes `pipe`."""
        policy = self.policy()
        said = repr(self._name(policy)) if self._name(policy) else f'memkern.Policy.from_json("""{policy.to_json()}""")'
        stage = "" if self.stage == "auto" else f", stage={self.stage!r}"
        options = "".join(f"        {name}={value!r},\n" for name, value in self.options().items())
        return (
            f"import memkern\nimport torch\n\n{loading}\nmemkern.patch(pipe, {said}{stage})\n"
            f"for seed in {list(self.seeds)}:\n    image = pipe(\n{options}"
            '        generator=torch.Generator("cpu").manual_seed(seed),\n    ).images[0]\n'
            '    image.save(f"{seed}.png")\n'
        )

    def _name(self, policy: Policy) -> str | None:
        """A preset's name that stands for the policy, or None."""
        names = [self.preset] if self.share is None else [f"zero-pad:{self.share:g}", self.preset]
        return next((name for name in names if Policy.parse(name) == policy), None)
