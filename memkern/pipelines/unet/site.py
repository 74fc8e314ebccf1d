"""A UNet or ControlNet that patched pipelines read with: memkern's processors and hooks on it, and whose call it is."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..holders import LOCK, Holders, hook_on, inert, inert_reduced
from ..session import Session, current
from .call import CALL, Call
from .contexts import Context, Contexts
from .keeping import why_not_kept
from .layers import is_compiled
from .look import WATCHED, count, judge
from .placement import Processors, missed_layers
from .schedule import Place, argument, position, sample_size

_NUMBERS = itertools.count()


# Of a UNet that is compiled by itself hooks are called outside its graph, as they are; where they are traced with it,
# in a function of a user's own, the operator looks.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _begin(site: Site, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    site.begin(args, kwargs)


@torch.compiler.substitute_in_graph(_begin, skip_signature_check=True)
def _traced_begin(
    site: Site, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if site.edits_kv:
        site.begin(args, kwargs)
        return None
    context = argument("encoder_hidden_states", 2, args, kwargs)
    if not isinstance(context, torch.Tensor):
        return None
    looked = torch.ops.memkern.look(context, site.number)
    if "encoder_hidden_states" in kwargs:
        return args, {**kwargs, "encoder_hidden_states": looked}
    return (*args[:2], looked, *args[3:]), kwargs


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _end(site: Site, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
    site.end()


@torch.compiler.substitute_in_graph(_end, skip_signature_check=True)
def _traced_end(site: Site, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if site.edits_kv:
        site.end()


class SiteHook(functools.partial[Any]):
    """A hook on a UNet: a call begins, or ends. A partial function, since dynamo traces into those."""

    @property
    def site(self) -> Site:
        """Whose it is."""
        found: Site = self.args[0]
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert()

    def __reduce__(self) -> tuple[Any, ...]:
        return inert_reduced()


class Site:
    """What memkern has put on one UNet or ControlNet; found by its hook, made by the first pipeline that needs it.

    Attributes:
        prefix: of its layers' names; empty for a UNet.
        holders: the patches whose pipelines read with it.
        requests: the calls of theirs that are under way.
        is_placed: whether memkern's processors are in force.
        edits_kv: whether any pipeline that shares it may edit keys and values.
        number: what a compiled graph finds it by.
    """

    def __init__(self, module: Any, prefix: str) -> None:
        self.prefix, self.number = prefix, next(_NUMBERS)
        self.holders, self.requests, self._computed, self._edited = Holders(), Holders(), Holders(), Holders()
        self.is_placed = self.edits_kv = False
        self._module = weakref.ref(module)
        self.processors = Processors()
        self._handles: list[Any] = []

    @staticmethod
    def of(module: Any, prefix: str = "") -> Site:
        """The site that is on `module`, or a new one."""
        hook = hook_on(module, SiteHook)
        return Site(module, prefix) if hook is None else hook.site

    def hold(self, holder: Any, *, needs: Any = None, processors: bool = False, kv: bool = False) -> None:
        """Put in what `holder` needs, a patch or what stands for one.

        Args:
            needs: who needs the processors; `holder` itself if None.
            processors: whether layers are to be computed here.
            kv: whether keys and values are to be edited.
        """
        with LOCK:
            self.holders.add(holder)
            who = holder if needs is None else needs
            if needs is not None:
                self.requests.add(needs)
            for wanted, users in ((processors, self._computed), (kv, self._edited)):
                (users.add if wanted else users.drop)(who)
            # What a tool has put in place of ours since stays, until the pipeline is patched again.
            self._settle(afresh=needs is None)

    def release(self, holder: Any, *, needs: Any = None) -> None:
        """Take out what nobody else needs; with `needs`, only what that needed."""
        with LOCK:
            for users in (self._computed, self._edited, self.requests):
                users.drop(holder if needs is None else needs)
            if needs is None:
                self.holders.drop(holder)
            self._settle()

    def _settle(self, *, afresh: bool = False) -> None:
        module, held = self._module(), bool(self.holders) or bool(self.requests)
        if module is None:
            return
        if held and not self._handles:
            WATCHED[self.number] = _watcher(self)
            self._handles = [
                module.register_forward_pre_hook(SiteHook(_begin, self), with_kwargs=True),
                module.register_forward_hook(SiteHook(_end, self)),
            ]
        if self._computed:
            if afresh or not self.is_placed:
                self.processors.place(module, self, self.prefix)
        else:
            self.processors.take_out(module, self)
        self.is_placed, self.edits_kv = bool(self._computed), bool(self._edited)
        if not held:
            WATCHED.pop(self.number, None)
            for handle in self._handles:
                handle.remove()
            self._handles = []

    @property
    def call(self) -> Call | None:
        """The call that this context is in, if it is one of this site's."""
        call = CALL.get()
        return call if call is not None and call.site is self else None

    @property
    def module(self) -> Any:
        """The UNet or ControlNet; None once it is gone."""
        return self._module()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The UNet is called: a context that it was not given before is looked at."""
        context = argument("encoder_hidden_states", 2, args, kwargs)
        whose = _whose(self, context)
        if whose is None:
            CALL.set(None)
            return
        call = Call(self, *whose)
        CALL.set(call)
        if is_compiled(self._module(), call.session.pipe):
            call.session.left_alone["the UNet is compiled"] = None
        if isinstance(context, torch.Tensor) and context.dim() == 3:
            call.context, call.known = context, self._known(call, context)
            sample = sample_size(args, kwargs)
            where = None
            if call.known.edits is not None and call.known.edits.follows_steps:
                times = getattr(getattr(call.session.pipe, "scheduler", None), "timesteps", None)
                where = position(argument("timestep", 1, args, kwargs), times)
            call.place = Place(sample, where)

    def _known(self, call: Call, context: torch.Tensor) -> Context:
        """What is known of a context; one that is new is recognised, and judged."""
        session = call.session
        kept = session.kept.get(self)
        if kept is None:
            kept = session.kept.setdefault(self, Contexts())
        known: Context = kept.of(context)
        if known.rows is None:
            if call.direct:
                session.reasons.clear()
            known.recognise(context, session, direct=call.direct)
            assert known.rows is not None
            try:
                judge(session, known.rows, direct=call.direct)
                if not self.prefix and not known.is_edited:
                    count(session, known.rows)
            except BaseException:
                # Looked at anew if it is tried again.
                known.rows = None
                raise
            finally:
                call.settle()
        return known

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self) -> None:
        """The call is over: layers that should have edited keys and values, and did not, are found.

        Raises:
            UnmitigatedError: there are some, and `on_unknown` is "raise".
        """
        call = self.call
        if call is None:
            return
        CALL.set(None)
        known, module = call.known, self._module()
        if known is None or module is None or not known.is_edited or known.rows is None or not call.computes:
            return
        assert known.edits is not None
        missed = missed_layers(module, self.prefix, known.edits, call.place, call.reached, call.causes)
        try:
            if missed:
                names = list(missed)
                more = f" and {len(names) - 1} more" if names[1:] else ""
                call.session.unreached.update(missed)
                if not self.prefix:
                    count(call.session, known.rows, shortfall=True)
                call.session.unmitigated(
                    f"keys and values of {len(names)} cross-attention layers were not edited: {names[0]}{more}: "
                    f"{missed[names[0]]}"
                )
            absent = sorted(known.edits.sizes(call.place) - call.sizes) if not self.prefix else []
            if absent:
                count(call.session, known.rows, shortfall=True)
                call.session.unreached.update({f"size {size}": "no layer of the call has it" for size in absent})
                call.session.unmitigated(f"no cross-attention layer of this call has the size {', '.join(absent)}")
            if not known.is_counted and not self.prefix:
                count(call.session, known.rows)
        finally:
            known.is_counted = True
            call.settle()

    def attend(
        self, name: str, attn: Any, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """A layer's output before its residual; None where its former processor is to compute it."""
        call = self.call
        if call is None:
            # A layer that is called by itself.
            whose = _whose(self, context)
            if whose is None:
                return None
            call = Call(self, *whose)
        if not call.computes:
            return None
        known, session = call.known, call.session
        if known is None or call.context is not context:
            edited = known.is_edited if known is not None else session.settings.applied == "kv"
            known = self._known(call, context) if edited else session.kept.setdefault(self, Contexts()).of(context)
        active = call.active(name, x, known, mask) if known.is_edited else ()
        if active is None:
            return None
        reason = why_not_kept(x, context, mask) if call.accelerates else "accelerate=False"
        if reason is not None:
            session.left_alone[reason] = None
            if not active:
                return None
        out, made = known.attend(attn, x, context, active, session.settings.backend, keep=reason is None)
        if made is not None:
            session.layers[name] = made.choice
        elif active and name not in session.layers:
            session.layers[name] = "edited, nothing kept"
        return out


def _watcher(site: Site) -> Callable[[torch.Tensor], None]:
    """What looks at a context for a compiled graph: it holds the site weakly."""
    reference = weakref.ref(site)

    def watch(context: torch.Tensor) -> None:
        found = reference()
        whose = None if found is None else _whose(found, context)
        if found is None or whose is None or context.dim() != 3:
            return
        call = Call(found, *whose)
        call.session.left_alone["the UNet is compiled"] = None
        if found._known(call, context).is_edited:
            call.session.unmitigated(
                "the UNet was compiled before any pipeline edited keys and values; compile it anew, or call "
                "torch.compiler.reset()"
            )

    return watch


def _whose(site: Site, context: Any = None) -> tuple[Session, bool] | None:
    """Whose call it is, and whether it is one outside any call of a pipeline; None if of no patched pipeline's."""
    session = current()
    if session is not None and (session in site.requests or session.patch in site.holders):
        return session, False
    holders = site.holders.all()
    if not holders:
        return None
    holder = next((one for one in holders if one.in_force.edits), holders[0])
    if len(holders) > 1 and isinstance(context, torch.Tensor) and context.dim() == 3:
        holder = holder.maker_among(holders, context) or holder
    return holder.direct(), True
