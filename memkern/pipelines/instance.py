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

from ..errors import UnmitigatedError, UnmitigatedWarning
from ..ops import backends
from ..policy import BRANCHES, REEMBEDDED_AS, Bank, Branch, Policy
from ..scope import check_layers
from . import encoding, layout, supported
from .acceleration import Acceleration
from .edits import edit_outputs, edit_rows
from .encoding import Encoded, Encoding, ObservedTokenizer
from .kv import KVStage
from .rows import Encodings
from .sites import Sites, kv_refusals, layers_of, roots
from .slots import Slot, clip_embeddings, slots
from .status import Status
from .text_encoder import PadSwapHook

OnUnknown = Literal["raise", "warn", "pass"]
StageChoice = Literal["auto", "embeds", "kv"]


class EncodePrompt:
    """Takes the place of a pipeline's bound method that encodes prompts; `patch` is the `Patch` it belongs to."""

    def __init__(self, patch: Patch, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.patch = patch
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(self.original).bind(*args, **kwargs)
        call.apply_defaults()
        self.patch.begin()
        reembedded = None
        if self.patch.policy.reads(Bank.PAD_REEMBEDDED):
            with self.patch.observing(REEMBEDDED_AS):
                reembedded = self.original(*args, **kwargs)
        with self.patch.observing(self.patch.policy.reembed_pads) as seen:
            outputs = self.original(*args, **kwargs)
        return edit_outputs(self.patch, call.arguments, seen.calls, outputs, reembedded)


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
        controlnet: whether a ControlNet's cross-attention is treated as the UNet's is.
        acceleration: what is kept of contexts.
        prompts: what was encoded last under what is in force now, by branch.
        encodings: the embeddings of those, where the kv stage or a probe is to recognise them.
        prompt_number: counts the prompts.
    """

    def __init__(self, pipe: Any, policy: Policy, **settings: Any) -> None:
        self.pipe = pipe
        self.acceleration = Acceleration(settings["backend"])
        self.sites: Sites | None = None
        self.encodings: dict[Branch, Encodings] = {}
        self.prompt_number = 0
        self._told: str | None = None
        self._watchers = 0
        self._set(policy, **settings)
        self._method = layout.method(pipe)
        self._own_encode_prompt = vars(pipe).get(self._method)
        self._encode_prompt = EncodePrompt(self, getattr(pipe, self._method))
        self._hooks: dict[Slot, tuple[Any, Any]] = {}

    def install(self) -> None:
        """Put all sites in place; if one fails, none stays."""
        try:
            self._hook()
            setattr(self.pipe, self._method, self._encode_prompt)
            self._accelerate()
        except BaseException:
            vars(self.pipe).pop(self._method, None)
            self._unhook()
            raise

    def _hook(self) -> None:
        """Put hooks on the embedding layers that the pipeline has now."""
        wanted = {slot: slot.embeddings(self.pipe) for slot in slots(self.pipe)}
        if {slot: module for slot, (module, _) in self._hooks.items()} != wanted:
            self._unhook()
            for slot, module in wanted.items():
                hook = PadSwapHook(self, slot)
                self._hooks[slot] = module, module.register_forward_pre_hook(hook, with_kwargs=True)

    def _unhook(self) -> None:
        for _, handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def _accelerate(self) -> None:
        """Put the processors into the UNet that the pipeline has now, or take them out."""
        found = roots(self.pipe, controlnet=self.controlnet)
        wanted = self.accelerate or self.stage == "kv"
        self.acceleration.clear()
        sites = self.sites
        if sites is not None and not (
            wanted and sites.roots == found and sites.complete and sites.in_steps == (self.stage == "kv")
        ):
            sites.remove()
            self.sites = None
        if wanted and self.sites is None:
            self.sites = Sites(found, self.acceleration, lambda: self.pipe.scheduler)

    @property
    def lost(self) -> str | None:
        """Why layers that were put in place are not reached by now; None where all are."""
        if self.sites is None:
            return None
        if roots(self.pipe, controlnet=self.controlnet) != self.sites.roots:
            return "the pipeline's UNet or ControlNet was exchanged"
        return None if self.sites.complete else "processors of the UNet were replaced"

    def begin(self) -> None:
        """A new prompt: forget the last one, and see whether what was put in place is there."""
        if self.sites is None and (self.accelerate or self.stage == "kv"):
            self._set(**self.settings)  # a copy of a patched pipeline
            self._accelerate()
        self.acceleration.clear()
        self.encodings.clear()
        self.prompt_number += 1
        lost = self.lost
        if lost is not None and lost != self._told:
            again = f"{lost} since it was patched; call memkern.patch(pipe) or patch.update() again"
            if self.stage == "kv":
                self.unknown(again)
            else:
                warnings.warn(f"memkern: {again} to have them accelerated", stacklevel=4)
        self._told = lost if self.stage == "embeds" else None

    @property
    def installed(self) -> bool:
        """Whether this patch is still on its pipeline."""
        return find(self.pipe) is self

    @property
    def replaced_by(self) -> object | None:
        """What stands in place of memkern's `encode_prompt`, if something else was put there since."""
        current = vars(self.pipe).get(self._method)
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
                f"unpatch: {self.replaced_by!r} was put in place of memkern's pipe.{self._method}; undo that first"
            )
        if self._own_encode_prompt is None:
            delattr(self.pipe, self._method)
        else:
            setattr(self.pipe, self._method, self._own_encode_prompt)
        self._unhook()
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
        controlnet: bool | None = None,
    ) -> None:
        """Change what is in force, live; what is not named stays. Checked as in `patch` before it takes effect.

        A text encoder or UNet that was exchanged since is taken in place of the former one.

        Raises:
            RuntimeError: this patch was removed.
        """
        if not self.installed:
            raise RuntimeError("update: this patch was removed; call memkern.patch(pipe) again")
        changes = {
            "backend": backend,
            "on_unknown": on_unknown,
            "accelerate": accelerate,
            "stage": stage,
            "controlnet": controlnet,
        }
        settings = self.settings | {name: value for name, value in changes.items() if value is not None}
        settings["policy"] = self.policy if policy is None else Policy.of(policy)
        self._set(**settings)
        self._hook()
        self._accelerate()

    def _set(
        self,
        policy: Policy,
        *,
        backend: str,
        on_unknown: OnUnknown,
        accelerate: bool,
        stage: StageChoice,
        controlnet: bool,
    ) -> None:
        asked_stage = stage
        if on_unknown not in ("raise", "warn", "pass"):
            raise ValueError(f"on_unknown: expected 'raise', 'warn' or 'pass', got {on_unknown!r}")
        backends.require_installed(backend)
        for slot in slots(self.pipe):
            slot.token_id(self.pipe, policy, policy.reembed_pads)
        stage = supported.stage(policy, asked_stage)
        if stage == "kv":
            found = roots(self.pipe, controlnet=controlnet)
            supported.require_kv(self.pipe, policy, kv_refusals(found, self.acceleration))
            check_layers(policy, [name for name, _ in layers_of(found)])
        self.policy, self.backend, self.on_unknown, self.accelerate = policy, backend, on_unknown, accelerate
        self.controlnet = controlnet
        self.asked_stage, self.stage = asked_stage, stage
        self.prompts: dict[Branch, tuple[Encoded, ...]] = {}
        self.encodings.clear()
        length = self.context_length
        self.acceleration.backend, self.acceleration.enabled = backend, accelerate
        self.acceleration.stage = KVStage(policy, self.encodings, self.unknown, length) if stage == "kv" else None
        self.watching = self.acceleration.stage or KVStage(Policy(), self.encodings, self.unknown, length)

    @property
    def is_watched(self) -> bool:
        """Whether someone wants to know whose rows the UNet has."""
        return self._watchers > 0

    @property
    def context_length(self) -> int:
        """Tokens in a window."""
        return slots(self.pipe)[0].vocabulary(self.pipe).context_length

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, as `update` takes it."""
        return {
            "policy": self.policy,
            "backend": self.backend,
            "on_unknown": self.on_unknown,
            "accelerate": self.accelerate,
            "stage": self.asked_stage,
            "controlnet": self.controlnet,
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
        own, attributes = slots(self.pipe), vars(self.pipe)
        words = {slot: (slot.vocabulary(self.pipe), slot.token_id(self.pipe, self.policy, pad_with)) for slot in own}
        seen = Encoding(self, words)
        tokenizers = {slot.tokenizer: attributes[slot.tokenizer] for slot in own}
        # Past the pipeline's __setattr__, which would write the stand-ins into its config.
        attributes.update({name: ObservedTokenizer(tokenizer, seen) for name, tokenizer in tokenizers.items()})
        try:
            with encoding.entered(seen):
                yield seen
        finally:
            attributes.update(tokenizers)

    @contextmanager
    def encoding(self, branch: Branch = "cond") -> Iterator[Callable[..., torch.Tensor]]:
        """Direct text-encoder calls inside count as encoding prompts of `branch`: their pads are swapped.

        Yields:
            A function that applies the policy's edits to the embeddings `[B, L, D]` made inside, after
            whatever weighting, of both text encoders side by side where there are two; what it returns is
            recognised by the pipeline as edited:

                with patch.encoding("cond") as edited:
                    embeds = pipe.text_encoder(input_ids)[0]
                    embeds = edited(embeds)

            Embeddings of several windows, as compel and sd_embed make them, were made by a call for each. Where there
            were others in between (weighted words), say which ids they are of: `edited(embeds, input_ids)`, ids
            `[B, L]`; windows behind those are taken as empty prompts', which fill up the shorter of two prompts.
        """
        if branch not in BRANCHES:
            raise ValueError(f"branch: expected one of {', '.join(BRANCHES)}, got {branch!r}")
        with self.observing(self.policy.reembed_pads) as seen:

            def edited(embeds: torch.Tensor, input_ids: torch.Tensor | None = None) -> torch.Tensor:
                windows = embeds.shape[1] // self.context_length
                if input_ids is None:
                    calls = [seen.last(slot, windows) for slot in slots(self.pipe)]
                else:
                    calls = [seen.given(slot, input_ids, windows) for slot in slots(self.pipe)]
                return edit_rows(self, embeds, calls, branch)

            yield edited

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
    own = getattr(pipe, "__dict__", {}).get(layout.method(pipe))
    owners = [own.patch] if isinstance(own, EncodePrompt) else []
    for slot in slots(pipe):
        embeddings = clip_embeddings(getattr(pipe, slot.encoder))
        hooks = embeddings._forward_pre_hooks.values() if embeddings is not None else ()
        owners += [hook.owner for hook in hooks if isinstance(hook, PadSwapHook)]
    return next((owner for owner in owners if owner.pipe is pipe), None)
