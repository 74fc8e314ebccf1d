"""The body of a request for an image, and the rules that the operator sets."""

from __future__ import annotations

import secrets
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat

from .errors import Refusal
from .messages import Job
from .settings import Settings


def _whole(text: str) -> str:
    """`text`, unless it has half of a surrogate pair, which JSON can write and no tokenizer reads."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("should be valid unicode, without half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_whole)]


class ImageRequest(BaseModel):
    """A client's request; the server chooses what it leaves out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Text | None = None
    negative_prompt: Text = ""
    policy: str | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    steps: Annotated[int | None, Field(ge=1)] = None
    guidance: Annotated[FiniteFloat, Field(ge=0, le=100)] = 7.5
    prompt_embeds: list[list[FiniteFloat]] | None = None
    """Embeddings made elsewhere `[tokens, width]`, in place of a prompt. memkern cannot know what is in them: they are
    refused under any policy that edits."""


def job_of(body: ImageRequest, settings: Settings) -> Job:
    """The job that a request asks for.

    Raises:
        Refusal: a policy that is not allowed, a prompt that is too long, or one of the limits, with the given value and
            the expected one.
    """
    policy = settings.policies[0] if body.policy is None else body.policy
    if policy not in settings.policies:
        allowed = ", ".join(map(repr, settings.policies))
        raise Refusal(422, "unknown_policy", f"policy: expected one of {allowed}, got {policy[:100]!r}")
    if (body.prompt is None) == (body.prompt_embeds is None):
        came = "neither" if body.prompt is None else "both"
        raise Refusal(422, "invalid", f"expected either prompt or prompt_embeds, got {came}")
    for name in ("prompt", "negative_prompt"):
        characters = len(getattr(body, name) or "")
        if characters > settings.max_prompt:
            reason = f"{name}: expected at most {settings.max_prompt} characters, got {characters}"
            raise Refusal(422, "prompt_too_long", reason)
    steps = settings.steps if body.steps is None else body.steps
    if steps > settings.max_steps:
        raise Refusal(422, "invalid", f"steps: expected at most {settings.max_steps}, got {steps}")
    return Job(
        prompt=body.prompt,
        policy=policy,
        seed=secrets.randbits(32) if body.seed is None else body.seed,
        steps=steps,
        guidance=body.guidance,
        negative_prompt=body.negative_prompt,
        prompt_embeds=body.prompt_embeds,
    )
