"""One patched pipeline: its default settings, and the way back.

Patching puts three sites in place, and unpatching takes them out again:

- a class of its own for the pipeline, which knows when a call begins and edits the result of `encode_prompt`
  (`instance.py` makes it);
- a hook on the embedding layer of each text encoder, which swaps the pads (`prompt/pad_swap.py`);
- hooks and processors on the UNet, which check the rows that reach it, and compute or edit its cross-attention
  (`unet/site.py`).

No class is changed, and no parameter, buffer or submodule is added. The state of a request is on its `Session`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from ..ledger import LEDGER, Stage
from ..policy import BRANCHES, Branch, Policy
from ..scope import check_layers
from .attached import Attached
from .family import outputs, refusals
from .family.encoders import POOLED_ONLY, slots
from .prompt.direct import directly
from .session import Owner, Session, Settings, Tally, binding, bound, current
from .status import Status
from .unet.layers import kv_refusals, layers_of, roots
from .unet.site import Site


class Patch:
    """A patched pipeline: its settings, and the way back. Made by `patch`.

    Args:
        pipe: the pipeline, held weakly.
        family: the state that it shares with its copies.
        settings: those of calls that begin from now on, unless `using` says otherwise.

    Attributes:
        slots: the text encoders that the pipeline had when it was patched.
        context_length: tokens in a window.
        last: the session of the last prompt; None until there is one.
    """

    def __init__(self, pipe: Any, family: Any, settings: Settings) -> None:
        self.family, self.settings = family, settings
        self._pipe = weakref.ref(pipe)
        self.slots = slots(pipe)
        self.context_length = self.slots[0].vocabulary(pipe).context_length if self.slots else 0
        self.last: Session | None = None
        self.is_removed = False
        self._direct: Session | None = None
        self.attached: Attached = Attached(self)
        self.told_of: str | None = None

    @property
    def pipe(self) -> Any:
        """The pipeline.

        Raises:
            ReferenceError: it is gone.
        """
        pipe = self._pipe()
        if pipe is None:
            raise ReferenceError("patch: its pipeline is gone")
        return pipe

    @property
    def base(self) -> type:
        """The pipeline's class, without memkern."""
        found: type = self.family.base
        return found

    @property
    def tally(self) -> Tally:
        """The counts of rows, shared with the pipeline's copies."""
        found: Tally = self.family.tally
        return found

    @property
    def in_force(self) -> Settings:
        """The settings in force in this context: those that `using` bound here, or else the default."""
        return binding(self) or binding(self.family) or self.settings

    @property
    def policy(self) -> Policy:
        """The policy in force in this context."""
        return self.in_force.policy

    @property
    def stage(self) -> Stage:
        """The stage at which the policy is applied: "embeds" or "kv"."""
        return self.in_force.applied

    @property
    def on_unknown(self) -> str:
        """The action in this context for rows that would go unedited."""
        return self.in_force.on_unknown

    def attach(self) -> None:
        """Put hooks on the text encoders and sites on the UNet that the pipeline has now."""
        self.attached.attach(self.pipe, self.slots, self.settings)
        self.told_of = None

    def detach(self) -> None:
        """Take hooks and sites out, where no other pipeline needs them."""
        self.attached.detach()
        self.last = self._direct = None
        self.is_removed = True

    @property
    def sites(self) -> list[Site]:
        """The sites of the pipeline's UNet and ControlNets."""
        return self.attached.sites

    @property
    def lost(self) -> str | None:
        """The reason why layers with memkern's processors are no longer reached; None if all are reached."""
        return self.attached.lost(self.pipe)

    def check(self, settings: Settings) -> None:
        """Raise if `settings` cannot be in force on this pipeline; nothing is changed.

        Raises:
            ValueError: a token to pad with is unknown, or keys and values cannot be edited, with the reasons.
        """
        pipe, policy = self.pipe, settings.policy
        for slot in slots(pipe):
            slot.token_id(pipe, policy, policy.reembed_pads)
        if settings.applied == "kv":
            layers = layers_of(roots(pipe, controlnet=settings.controlnet))
            refusals.require_kv(pipe, policy, kv_refusals(layers))
            check_layers(policy, [name for name, _ in layers])

    def update(self, policy: Policy | str | None = None, **settings: Any) -> None:
        """Change the settings of calls that begin from now on; settings that are not named stay. All are checked before
        they take effect.

        A text encoder or UNet that was exchanged since then takes the place of the former one.

        Args:
            policy, settings: as those of `patch`.

        Raises:
            RuntimeError: this patch was removed.
        """
        if self.is_removed:
            raise RuntimeError("update: this patch was removed; call memkern.patch(pipe) again")
        changed = self.settings.changed(policy, **settings)
        self.check(changed)
        self.settings = changed
        self.family.settings_changed(self)
        self.last = self._direct = None
        self.slots = slots(self.pipe) or self.slots
        self.attach()

    def remove(self) -> None:
        """Restore the pipeline: every hook and attribute is the object it was. A second call does nothing.

        Raises:
            RuntimeError: something else was put in place of memkern's `encode_prompt`; remove that first.
        """
        if not self.is_removed:
            self.family.restore(self)

    @property
    def replaced_by(self) -> object | None:
        """The object that has replaced memkern's `encode_prompt` since; None if nothing has."""
        found: Any = vars(self.pipe).get(outputs.method(self.pipe))
        # The class's own method, put back by hand, is no replacement.
        same = getattr(found, "__func__", None) is getattr(type(self.pipe), outputs.method(self.pipe))
        return None if same and found.__self__ is self.pipe else found

    def status(self) -> Status:
        """The settings in force, the sites, and the last prompts."""
        return Status.of(self)

    def direct(self) -> Session:
        """The session for work outside any call of the pipeline."""
        return self._direct or self.begin_direct(self.pipe)

    def begin_direct(self, pipe: Any) -> Session:
        """Begin the session of a prompt that is encoded outside any call of the pipeline."""
        self._direct = Session(self.in_force, pipe, self)
        return self._direct

    @contextmanager
    def encoding(self, branch: Branch = "cond") -> Iterator[Callable[..., torch.Tensor]]:
        """Let direct text-encoder calls inside count as encoding prompts of `branch`: their pads are swapped.

        Yields:
            A function that applies the policy's edits to the embeddings `[B, L, D]` made inside, after any
            weighting, with both text encoders side by side where there are two. The pipeline recognises its
            result as edited:

                with patch.encoding("cond") as edited:
                    embeds = pipe.text_encoder(input_ids)[0]
                    embeds = edited(embeds)

            Embeddings of several windows, as compel and sd_embed make them, need one encoder call per window. If there
            were other calls in between (weighted words), pass their ids: `edited(embeds, input_ids)`, ids `[B, L]`.
            Windows after the ids count as those of empty prompts, which fill up the shorter of two prompts.
        """
        if branch not in BRANCHES:
            raise ValueError(f"branch: expected one of {', '.join(BRANCHES)}, got {branch!r}")
        self.last = session = Session(self.in_force, self.pipe, self)
        with directly(session, branch) as edited:
            yield edited

    def called_outside(self) -> None:
        """Handle a text-encoder call that no patched `encode_prompt` made."""
        session = current()
        if session is None or session.patch is not cast(Owner, self):
            session = Session(self.in_force, self._pipe(), self)
        elif type(session.pipe).__name__ in POOLED_ONLY:
            return
        if session.settings.edits:
            session.unmitigated(
                "the text encoder of a patched pipeline was called outside its encode_prompt: by another pipeline "
                "that shares it (patch that one too) or directly (use `with patch.encoding('cond'):`)"
            )

    @staticmethod
    def maker_among(holders: list[Patch], context: torch.Tensor) -> Patch | None:
        """The patch among `holders` that made the rows of a context `[B, L, D]`; None if none did."""
        made = [row.maker() for row in LEDGER.recall(context) if row is not None and row.maker is not None]
        return next((holder for maker in made for holder in holders if holder.family is maker), None)


@contextmanager
def in_force(patch: Patch, settings: Settings, whole_family: bool) -> Iterator[None]:
    """Put checked `settings` in force in this context, and on the UNet the processors that they need."""
    needs = _Needs()
    patch.attached.hold(settings, needs=needs)
    try:
        with bound(patch.family if whole_family else patch, settings):
            yield
    finally:
        patch.attached.let_go(needs)


class _Needs:
    """Stands for a `with` block among the users of a site."""
