"""One patched pipeline: three sites, each put in place of the pipeline's own and taken out again.

- the text encoder's embedding layer gets a hook that swaps the pads (`text_encoder.py`);
- the pipeline gets an `encode_prompt` of its own that edits what the class's returns;
- the UNet's cross-attention layers get a processor that is faster and computes the same (`cross_attention.py`), or
  that edits keys and values (`kv.py`).

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
from ..ledger import Edited, recall_edited, remember_edited
from ..ops import backends
from ..policy import BRANCHES, REEMBEDDED_AS, Bank, Branch, Policy
from ..roles import Role
from ..windows import check_layers
from . import encoding, support
from .acceleration import Acceleration
from .cross_attention import Sites, cross_attention_layers, kv_refusals
from .encoding import Encoded, Encoding, ObservedTokenizer
from .kv import KVStage
from .rows import Encodings
from .status import Status
from .text_encoder import PadSwapHook, clip_embeddings

OnUnknown = Literal["raise", "warn", "pass"]
StageChoice = Literal["auto", "embeds", "kv"]


class EncodePrompt:
    """Takes the place of a pipeline's bound `encode_prompt`; `patch` is the `Patch` it belongs to."""

    def __init__(self, patch: Patch, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.patch = patch
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        call = inspect.signature(self.original).bind(*args, **kwargs)
        call.apply_defaults()
        self.patch.begin()
        reembedded = None
        if self.patch.policy.reads(Bank.PAD_REEMBEDDED):
            with self.patch.observing(REEMBEDDED_AS):
                reembedded = self.original(*args, **kwargs)
        with self.patch.observing(self.patch.policy.reembed_pads) as seen:
            outputs = self.original(*args, **kwargs)
        return self.patch.edit(call.arguments, seen.calls, outputs, reembedded)


class Patch:
    """A patched pipeline: what is in force, and the way back. Made by `patch`.

    Attributes:
        pipe: the pipeline.
        policy: the `Policy` in force.
        backend: the operators' backend, as asked for.
        on_unknown: what happens when a prompt cannot be classified: "raise", "warn" or "pass".
        accelerate: whether the UNet's cross-attention layers are computed by memkern where that is faster.
        asked_stage: "auto", "embeds" or "kv", as asked for.
        stage: where the policy is applied: "embeds" or "kv".
        acceleration: what is kept of contexts.
        prompts: what was encoded last under what is in force now, by branch.
        encodings: the embeddings of those, where the kv stage or a probe is to recognise them.
        prompt_number: counts the prompts.
    """

    def __init__(
        self, pipe: Any, policy: Policy, backend: str, on_unknown: OnUnknown, accelerate: bool, stage: StageChoice
    ) -> None:
        self.pipe = pipe
        self.acceleration = Acceleration(backend)
        self.sites: Sites | None = None
        self.encodings: dict[Branch, Encodings] = {}
        self.prompt_number = 0
        self._watchers = 0
        self._set(policy, backend, on_unknown, accelerate, stage)
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
        wanted = self.accelerate or self.stage == "kv"
        self.acceleration.clear()
        if self.sites is not None and not (
            wanted and self.sites.unet is unet and self.sites.complete and self.sites.in_steps == (self.stage == "kv")
        ):
            self.sites.remove()
            self.sites = None
        if wanted and self.sites is None:
            self.sites = Sites(unet, self.acceleration, lambda: self.pipe.scheduler)

    @property
    def lost(self) -> str | None:
        """What keeps the kv stage from reaching every layer by now; None where nothing does."""
        if self.stage == "kv" and self.sites is not None:
            if getattr(self.pipe, "unet", None) is not self.sites.unet:
                return "the pipeline's UNet was exchanged"
            if not self.sites.complete:
                return "processors of the UNet were replaced"
        return None

    def begin(self) -> None:
        """A new prompt: forget the last one, and see whether what was put in place is there."""
        self.acceleration.clear()
        self.encodings.clear()
        self.prompt_number += 1
        if self.lost is not None:
            self.unknown(f"{self.lost} since it was patched; call memkern.patch(pipe) or patch.update() again")

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
        stage: StageChoice | None = None,
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
            self.asked_stage if stage is None else stage,
        )
        self._hook()
        self._accelerate()

    def _set(
        self, policy: Policy, backend: str, on_unknown: OnUnknown, accelerate: bool, asked_stage: StageChoice
    ) -> None:
        if on_unknown not in ("raise", "warn", "pass"):
            raise ValueError(f"on_unknown: expected 'raise', 'warn' or 'pass', got {on_unknown!r}")
        backends.require_installed(backend)
        support.token_id(self.pipe, policy, policy.reembed_pads)
        stage = support.stage(policy, asked_stage)
        unet = getattr(self.pipe, "unet", None)
        if stage == "kv":
            support.require_kv(self.pipe, policy, kv_refusals(unet))
            check_layers(policy, [name for name, _ in cross_attention_layers(unet)])
        self.policy, self.backend, self.on_unknown, self.accelerate = policy, backend, on_unknown, accelerate
        self.asked_stage, self.stage = asked_stage, stage
        self.prompts: dict[Branch, Encoded] = {}
        self.encodings.clear()
        length = support.vocabulary(self.pipe).context_length
        self.acceleration.backend, self.acceleration.enabled = backend, accelerate
        self.acceleration.stage = KVStage(policy, self.encodings, self.unknown, length) if stage == "kv" else None
        self.watching = self.acceleration.stage or KVStage(Policy(), self.encodings, self.unknown, length)

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, as `update` takes it."""
        return {
            "policy": self.policy,
            "backend": self.backend,
            "on_unknown": self.on_unknown,
            "accelerate": self.accelerate,
            "stage": self.asked_stage,
        }

    def status(self) -> Status:
        """What is in force, where, and what the last prompts were."""
        return Status.of(self)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep what is encoded inside, so that who watches the UNet knows whose rows it has."""
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1
            if self.stage == "embeds" and not self._watchers:
                self.encodings.clear()

    @contextmanager
    def observing(self, pad_with: str | None) -> Iterator[Encoding]:
        """See every text-encoder call inside, its pads swapped for `pad_with`, and the tokenizer's masks."""
        self.prompts = {}
        pad_id = support.token_id(self.pipe, self.policy, pad_with)
        seen = Encoding(self, support.vocabulary(self.pipe), pad_id)
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
        with self.observing(self.policy.reembed_pads) as seen:

            def edited(embeds: torch.Tensor) -> torch.Tensor:
                if not seen.calls:
                    raise ValueError("embeds: the text encoder has not been called inside patch.encoding")
                return self._edited(embeds, seen.calls[-1], branch)

            yield edited

    def edit(
        self, arguments: dict[str, Any], calls: list[Encoded], outputs: Any, reembedded: Any = None
    ) -> tuple[torch.Tensor | None, ...]:
        """Edit what `encode_prompt` returned, (cond, uncond), by what it was called with and what it encoded.

        Args:
            reembedded: what it returned with "!" for the pads, where the policy reads that as well.
        """
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
                other = None if reembedded is None else reembedded[index]
                results[index] = self._edited(outputs[index], call_of[branch], branch, other)
            else:
                known = self._recognised(branch, given[branch])
                if known is not None:
                    remember_edited(outputs[index], known)
            known = recall_edited(results[index])
            if known is not None and (self.stage == "kv" or self._watchers):
                # A copy: kept itself, a context that a pipeline uses as it is would never die.
                self.encodings[branch] = Encodings(results[index].detach().clone(), known)
        return tuple(results)

    def _edited(
        self, embeds: torch.Tensor, encoded: Encoded, branch: Branch, reembedded: torch.Tensor | None = None
    ) -> torch.Tensor:
        backends.tell_fallback(embeds.device)
        self.prompts[branch] = encoded
        if reembedded is not None:
            # One of each prompt's images stands for all.
            reembedded = reembedded[:: embeds.shape[0] // encoded.roles.shape[0]]
        if self.stage == "kv":
            remember_edited(embeds, Edited(self.policy, branch, encoded.roles, "kv", reembedded))
            return embeds
        return edit_embeddings(
            embeds,
            encoded.roles,
            self.policy,
            branch,
            reembedded=reembedded,
            context_length=support.vocabulary(self.pipe).context_length,
            backend=self.backend,
        )

    def _recognised(self, branch: Branch, embeds: torch.Tensor) -> Edited | None:
        """What is known of embeddings that were passed in and need no edit; else the user is told."""
        edited = recall_edited(embeds)
        if edited is not None and edited.is_made_for(self.policy, branch, self.stage):
            return edited
        if not self.policy.touches(branch):
            # Whatever they are, nothing is done with them.
            roles = torch.full(embeds.shape[:2], int(Role.PROMPT), dtype=torch.uint8)
            return Edited(self.policy, branch, roles, self.stage)
        name = "prompt_embeds" if branch == "cond" else "negative_prompt_embeds"
        state = "not made by memkern"
        if edited is not None:
            made = "edited" if edited.stage == "embeds" else "encoded for the kv stage"
            state = f"{made} as {edited.branch} under '{edited.policy}'"
        self.unknown(
            f"{name} carries no token ids and is {state}, while '{self.policy}' is in force. Make it with the "
            "patched pipe.encode_prompt, patch.encoding or memkern.apply_policy, and pass that very tensor"
        )
        return None

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
