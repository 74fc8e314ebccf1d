"""Patching a pipeline: three sites, each put in place of the pipeline's own and taken out again.

- the text encoder's embedding layer gets a hook that swaps the pads (`text_encoder.py`);
- the pipeline gets an `encode_prompt` of its own that edits what the class's returns;
- the UNet's cross-attention layers get a processor that is faster and computes the same (`cross_attention.py`).

Nothing is global, no class changes, and no parameter, buffer or submodule is added.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from ..embeddings import edit_embeddings
from ..errors import UnmitigatedError, UnmitigatedWarning
from ..ledger import recall_edited, remember_edited
from ..ops import backends
from ..policy import BRANCHES, Branch, Policy
from . import encoding, support
from .acceleration import Acceleration
from .cross_attention import Sites
from .encoding import Encoded, Encoding, ObservedTokenizer
from .status import Status
from .text_encoder import PadSwapHook, clip_embeddings

OnUnknown = Literal["raise", "warn", "pass"]


class EncodePrompt:
    """Takes the place of a pipeline's bound `encode_prompt`; `patch` is the `Patch` it belongs to."""

    def __init__(self, patch: Patch, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.patch = patch
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        call = inspect.signature(self.original).bind(*args, **kwargs)
        call.apply_defaults()
        self.patch.acceleration.clear()
        with self.patch.observing() as seen:
            outputs = self.original(*args, **kwargs)
        return self.patch.edit(call.arguments, seen.calls, outputs)


class Patch:
    """A patched pipeline: what is in force, and the way back. Made by `patch`.

    Attributes:
        pipe: the pipeline.
        policy: the `Policy` in force.
        backend: the operators' backend, as asked for.
        on_unknown: what happens when a prompt cannot be classified: "raise", "warn" or "pass".
        accelerate: whether the UNet's cross-attention layers are computed by memkern where that is faster.
        acceleration: what is kept of contexts.
        prompts: what was encoded last under what is in force now, by branch.
    """

    def __init__(self, pipe: Any, policy: Policy, backend: str, on_unknown: OnUnknown, accelerate: bool) -> None:
        self.pipe = pipe
        self.acceleration = Acceleration(backend)
        self.sites: Sites | None = None
        self._set(policy, backend, on_unknown, accelerate)
        self._own_encode_prompt = vars(pipe).get("encode_prompt")
        self._encode_prompt = EncodePrompt(self, pipe.encode_prompt)
        self._hooked: Any = None
        self._handle: Any = None

    def install(self) -> None:
        """Put all sites in place; if one fails, none stays."""
        self._hook()
        try:
            self.pipe.encode_prompt = self._encode_prompt
            self._accelerate()
        except BaseException:
            vars(self.pipe).pop("encode_prompt", None)
            self._handle.remove()
            raise

    def _hook(self) -> None:
        """Put the hook on the embedding layer that the pipeline has now."""
        embeddings = support.embeddings_of(self.pipe)
        if embeddings is not self._hooked:
            handle = embeddings.register_forward_pre_hook(PadSwapHook(self), with_kwargs=True)
            if self._handle is not None:
                self._handle.remove()
            self._hooked, self._handle = embeddings, handle

    def _accelerate(self) -> None:
        """Put the processors into the UNet that the pipeline has now, or take them out."""
        unet = getattr(self.pipe, "unet", None)
        self.acceleration.clear()
        if self.sites is not None and not (self.accelerate and self.sites.unet is unet and self.sites.complete):
            self.sites.remove()
            self.sites = None
        if self.accelerate and self.sites is None:
            self.sites = Sites(unet, self.acceleration)

    @property
    def installed(self) -> bool:
        """Whether this patch is still on its pipeline."""
        return find(self.pipe) is self

    @property
    def replaced_by(self) -> object | None:
        """What stands in place of memkern's `encode_prompt`, if something else was put there since."""
        current = vars(self.pipe).get("encode_prompt")
        return None if current is self._encode_prompt else current

    def remove(self) -> None:
        """Restore the pipeline: every hook and attribute is the object it was. A second call does nothing.

        Raises:
            RuntimeError: something else was put in place of memkern's `encode_prompt`; it is to go first.
        """
        if not self.installed:
            return
        if self.replaced_by is not None:
            raise RuntimeError(
                f"unpatch: {self.replaced_by!r} was put in place of memkern's pipe.encode_prompt; undo that first"
            )
        if self._own_encode_prompt is None:
            del self.pipe.encode_prompt
        else:
            self.pipe.encode_prompt = self._own_encode_prompt
        self._handle.remove()
        self.acceleration.clear()
        if self.sites is not None:
            self.sites.remove()

    def update(
        self,
        policy: Policy | str | None = None,
        *,
        backend: str | None = None,
        on_unknown: OnUnknown | None = None,
        accelerate: bool | None = None,
    ) -> None:
        """Change what is in force, live; what is not named stays. Checked as in `patch` before it takes effect.

        A text encoder or UNet that was exchanged since is taken in place of the former one.

        Raises:
            RuntimeError: this patch was removed.
        """
        if not self.installed:
            raise RuntimeError("update: this patch was removed; call memkern.patch(pipe) again")
        self._set(
            self.policy if policy is None else Policy.of(policy),
            self.backend if backend is None else backend,
            self.on_unknown if on_unknown is None else on_unknown,
            self.accelerate if accelerate is None else accelerate,
        )
        self._hook()
        self._accelerate()

    def _set(self, policy: Policy, backend: str, on_unknown: OnUnknown, accelerate: bool) -> None:
        policy.require_embeds_stage()
        if on_unknown not in ("raise", "warn", "pass"):
            raise ValueError(f"on_unknown: expected 'raise', 'warn' or 'pass', got {on_unknown!r}")
        backends.require_installed(backend)
        support.reembed_id(self.pipe, policy)
        self.policy, self.backend, self.on_unknown, self.accelerate = policy, backend, on_unknown, accelerate
        self.acceleration.backend = backend
        self.prompts: dict[Branch, Encoded] = {}

    def status(self) -> Status:
        """What is in force, where, and what the last prompts were."""
        return Status.of(self)

    @contextmanager
    def observing(self) -> Iterator[Encoding]:
        """See every text-encoder call inside, its pads swapped as the policy wants, and the tokenizer's masks."""
        self.prompts = {}
        seen = Encoding(self, support.vocabulary(self.pipe), support.reembed_id(self.pipe, self.policy))
        attributes = vars(self.pipe)
        tokenizer = attributes["tokenizer"]
        # Past the pipeline's __setattr__, which would write the stand-in into its config.
        attributes["tokenizer"] = ObservedTokenizer(tokenizer, seen)
        try:
            with encoding.entered(seen):
                yield seen
        finally:
            attributes["tokenizer"] = tokenizer

    @contextmanager
    def encoding(self, branch: Branch = "cond") -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Direct text-encoder calls inside count as encoding prompts of `branch`: their pads are swapped.

        Yields:
            A function that applies the policy's edits to the embeddings `[B, L, D]` made inside, after
            whatever weighting; what it returns is recognised by the pipeline as edited:

                with patch.encoding("cond") as edited:
                    embeds = pipe.text_encoder(input_ids)[0]
                    embeds = edited(embeds)
        """
        if branch not in BRANCHES:
            raise ValueError(f"branch: expected one of {', '.join(BRANCHES)}, got {branch!r}")
        with self.observing() as seen:

            def edited(embeds: torch.Tensor) -> torch.Tensor:
                if not seen.calls:
                    raise ValueError("embeds: the text encoder has not been called inside patch.encoding")
                return self._edited(embeds, seen.calls[-1], branch)

            yield edited

    def edit(self, arguments: dict[str, Any], calls: list[Encoded], outputs: Any) -> tuple[torch.Tensor | None, ...]:
        """Edit what `encode_prompt` returned, (cond, uncond), by what it was called with and what it encoded."""
        given = {"cond": arguments["prompt_embeds"], "uncond": arguments["negative_prompt_embeds"]}
        guided = arguments["do_classifier_free_guidance"]
        used = [branch for branch in BRANCHES if branch == "cond" or guided]
        encoded = [branch for branch in used if given[branch] is None]
        if len(calls) != len(encoded):
            self.unknown(
                f"encode_prompt called the text encoder {len(calls)} times where {len(encoded)} were expected, "
                "so it is not known which call encoded the prompt. If the text encoder was exchanged, patch again"
            )
            return tuple(outputs)
        call_of = dict(zip(encoded, calls, strict=True))
        results = list(outputs)
        for index, branch in enumerate(used):
            if branch in call_of:
                results[index] = self._edited(outputs[index], call_of[branch], branch)
            elif self._recognised(branch, given[branch]):
                remember_edited(outputs[index], self.policy, branch)
        return tuple(results)

    def _edited(self, embeds: torch.Tensor, encoded: Encoded, branch: Branch) -> torch.Tensor:
        backends.tell_fallback(embeds.device)
        self.prompts[branch] = encoded
        return edit_embeddings(
            embeds,
            encoded.roles,
            self.policy,
            branch,
            context_length=support.vocabulary(self.pipe).context_length,
            backend=self.backend,
        )

    def _recognised(self, branch: Branch, embeds: torch.Tensor) -> bool:
        """Whether embeddings that were passed in need no edit; if not, the user is told."""
        edited = recall_edited(embeds)
        if edited == (self.policy, branch) or not self.policy.touches(branch):
            return True
        name = "prompt_embeds" if branch == "cond" else "negative_prompt_embeds"
        state = "not made by memkern" if edited is None else f"edited as {edited.branch} under '{edited.policy}'"
        self.unknown(
            f"{name} carries no token ids and is {state}, while '{self.policy}' is in force. Make it with the "
            "patched pipe.encode_prompt, patch.encoding or memkern.apply_policy, and pass that very tensor"
        )
        return False

    def called_outside(self) -> None:
        """The text encoder was called, and not by the patched `encode_prompt`."""
        if self.policy.touches("cond") or self.policy.touches("uncond"):
            self.unknown(
                "the text encoder of a patched pipeline was called outside its encode_prompt: by another pipeline "
                "that shares it (patch that one too) or directly (use `with patch.encoding('cond'):`)"
            )

    def unknown(self, reason: str) -> None:
        """A prompt goes through unedited: tell the user, as `on_unknown` says."""
        message = f"memkern: this prompt would not be protected: {reason} (on_unknown={self.on_unknown!r})"
        if self.on_unknown == "raise":
            raise UnmitigatedError(message)
        if self.on_unknown == "warn":
            warnings.warn(message, UnmitigatedWarning, stacklevel=2)


def find(pipe: object) -> Patch | None:
    """The patch that is on `pipe`, even if something else wraps its `encode_prompt` by now; or None."""
    own = getattr(pipe, "__dict__", {}).get("encode_prompt")
    owners = [own.patch] if isinstance(own, EncodePrompt) else []
    embeddings = clip_embeddings(getattr(pipe, "text_encoder", None))
    if embeddings is not None:
        owners += [hook.owner for hook in embeddings._forward_pre_hooks.values() if isinstance(hook, PadSwapHook)]
    return next((owner for owner in owners if owner.pipe is pipe), None)


def patch(
    pipe: Any,
    policy: Policy | str = "swap-pad-zero-eot",
    *,
    backend: str = "auto",
    on_unknown: OnUnknown = "raise",
    accelerate: bool = True,
) -> Patch:
    """Protect a diffusers pipeline: from now on its prompts are edited as `policy` says.

    Args:
        pipe: a Stable Diffusion pipeline with one CLIP text encoder. Patching it again replaces what is in
            force and returns the same `Patch`.
        policy: a `Policy` or a preset's name; the default is method 1 of Kim & No (arXiv 2605.02908).
        backend: of the operators, one of `memkern.ops.BACKENDS`.
        on_unknown: what happens when a prompt cannot be classified, such as raw `prompt_embeds`: "raise"
            an `UnmitigatedError`, "warn" with an `UnmitigatedWarning`, or "pass".
        accelerate: whether the UNet's cross-attention layers are computed by memkern where that is faster;
            False leaves the UNet as it is.

    Returns:
        The `Patch`.

    Raises:
        TypeError: `pipe` is not a pipeline, or `policy` is no policy.
        ValueError: the pipeline is not supported (with the reasons), or an argument is out of range.
        NotImplementedError: the policy needs the attention stage.
    """
    support.require(pipe)
    policy = Policy.of(policy)
    existing = find(pipe)
    if existing is not None:
        existing.update(policy, backend=backend, on_unknown=on_unknown, accelerate=accelerate)
        return existing
    made = Patch(pipe, policy, backend, on_unknown, accelerate)
    made.install()
    return made


def unpatch(pipe: object) -> None:
    """Restore `pipe`. A pipeline that is not patched is left as it is."""
    existing = find(pipe)
    if existing is not None:
        existing.remove()


def status(pipe: object) -> Status:
    """What is in force on `pipe`, where, and what its last prompts were: a value to print."""
    found = find(pipe)
    return Status(patched=False) if found is None else found.status()


@contextmanager
def patched(
    pipe: Any,
    policy: Policy | str = "swap-pad-zero-eot",
    *,
    backend: str = "auto",
    on_unknown: OnUnknown = "raise",
    accelerate: bool = True,
) -> Iterator[Patch]:
    """`patch` for the length of a `with` block; what was in force before is restored in any case."""
    before = find(pipe)
    former = None if before is None else (before.policy, before.backend, before.on_unknown, before.accelerate)
    made = patch(pipe, policy, backend=backend, on_unknown=on_unknown, accelerate=accelerate)
    try:
        yield made
    finally:
        if former is None:
            made.remove()
        else:
            made.update(former[0], backend=former[1], on_unknown=former[2], accelerate=former[3])
