"""A UNet or ControlNet of patched pipelines: memkern's processors and hooks on it, and the session of each call."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..attention.layer import Images, Layer
from ..holders import LOCK, Holders, hook_on, inert, inert_reduced
from ..session import Session, current
from .call import CALL, Call
from .contexts import Context, Contexts
from .keeping import is_captured, why_not_kept
from .look import count, judge
from .placement import Processors, missed_layers
from .schedule import Place, arguments, lora_scale, position
from .traced import NUMBERS, SITES, is_exported


# Hooks of a UNet that is compiled alone may be called outside its graph, as they are; where they are traced with it,
# operators take their place.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _begin(site: Site, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    site.begin(args, kwargs, lora_scale(kwargs))


@torch.compiler.substitute_in_graph(_begin, skip_signature_check=True)
def _traced_begin(
    site: Site, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    sample, time, context = arguments(args, kwargs)
    if not isinstance(context, torch.Tensor) or not isinstance(sample, torch.Tensor):
        return None
    if _is_left_out(site):
        return None
    if not isinstance(time, torch.Tensor):
        time = torch.full((), time, dtype=torch.float64, device="cpu")
    looked = torch.ops.memkern.unet_begins(sample, context, time, lora_scale(kwargs), site.number)
    if "sample" in kwargs:
        return args, {**kwargs, "sample": looked}
    return (looked, *args[1:]), kwargs


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _end(site: Site, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
    site.end()


@torch.compiler.substitute_in_graph(_end, skip_signature_check=True)
def _traced_end(site: Site, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if is_exported():
        return None
    # The output that depends on all layers: a UNet's sample, or the result of a ControlNet's middle block.
    if isinstance(output, tuple):
        last = torch.ops.memkern.unet_ends(output[-1], site.number)
        return (*output[:-1], last)
    name = "sample" if hasattr(output, "sample") else "mid_block_res_sample"
    output[name] = torch.ops.memkern.unet_ends(getattr(output, name), site.number)
    return output


class SiteHook(functools.partial[Any]):
    """A hook on a UNet for the beginning or end of a call. A partial function, since dynamo traces into those."""

    @property
    def site(self) -> Site:
        """The site that it belongs to."""
        found: Site = self.args[0]
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert()

    def __reduce__(self) -> tuple[Any, ...]:
        return inert_reduced()


class Site:
    """The hooks and processors on one UNet or ControlNet; found by its hook, made by the first pipeline that needs it.

    Attributes:
        prefix: that of its layers' names; empty for a UNet.
        holders: the patches whose pipelines use it.
        requests: the sessions of their calls that are under way.
        is_placed: whether memkern's processors are in force.
        edits_kv: whether any pipeline that shares it may edit keys and values.
        number: the one by which a compiled graph finds it.
    """

    def __init__(self, module: Any, prefix: str) -> None:
        self.prefix, self.number = prefix, next(NUMBERS)
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
        """Put in what `holder` needs, a patch or a stand-in for one.

        Args:
            needs: the user of the processors; `holder` itself if None.
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
            # A tool's processor that has replaced ours since stays, until the pipeline is patched again.
            self._settle(afresh=needs is None)

    def release(self, holder: Any, *, needs: Any = None) -> None:
        """Take out what no other user needs; with `needs`, only what that one needed."""
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
            SITES[self.number] = self
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
            SITES.pop(self.number, None)
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
    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], scale: float = 1.0) -> None:
        """Begin a call of the UNet: a context that it has not seen before is checked.

        Args:
            scale: the factor of its LoRAs.
        """
        if _is_left_out(self):
            CALL.set(None)
            return
        self.processors.leave_compiled_blocks(self._module())
        sample, time, context = arguments(args, kwargs)
        whose = _whose(self, context)
        if whose is None:
            CALL.set(None)
            return
        call = Call(self, *whose, lora_scale=scale)
        CALL.set(call)
        if isinstance(context, torch.Tensor) and context.dim() == 3:
            call.context, call.known = context, self._known(call, context)
            where = None
            if call.known.edits is not None and call.known.edits.follows_steps:
                times = getattr(getattr(call.session.pipe, "scheduler", None), "timesteps", None)
                where = position(time, times)
            call.place = Place(None if sample is None else tuple(sample.shape[-2:]), where)

    def _known(self, call: Call, context: torch.Tensor) -> Context:
        """The `Context` that describes a tensor; a new one is recognised, and judged."""
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
                # The next try judges it again.
                known.rows = None
                raise
            finally:
                call.settle()
        return known

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self) -> None:
        """End the call: find layers that should have edited keys and values, and did not.

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
        try:
            _find_missed(call, module)
            if not known.is_counted and not self.prefix:
                count(call.session, known.rows)
        finally:
            known.is_counted = True
            call.settle()

    def attend(
        self, name: str, attn: Any, former: Any, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None,
        images: Images | None,
    ) -> torch.Tensor | None:  # fmt: skip
        """A layer's output; None where its former processor is to compute it."""
        call = self.call or _alone(self, context)
        if call is None or not call.computes:
            return None
        known, session = call.known, call.session
        if known is None or call.context is not context:
            edited = known.is_edited if known is not None else session.settings.applied == "kv"
            known = self._known(call, context) if edited else session.kept.setdefault(self, Contexts()).of(context)
        active = call.active(name, x, known, mask) if known.is_edited else ()
        if active and is_captured(x):
            # A graph of the stream would replay this prompt's keys for other prompts.
            call.reached.discard(name)
            call.causes[name] = "a stream is being captured, in which nothing is edited"
            active = None
        if active is None:
            return None
        reason = why_not_kept(x, context, mask) if call.accelerates else "accelerate=False"
        if reason is not None:
            session.left_alone[reason] = None
            if not active:
                return None
        layer = Layer(attn, former)
        out, prepared, is_new = known.attend(
            layer, x, context, images, active, session, keep=reason is None, by_value=call.direct
        )
        if prepared is None:
            if active:
                session.layers.setdefault(name, "edited, nothing kept")
            return out
        if is_new:
            session.layers[name] = prepared.choice
            session.keeps()
        if images is None:
            call.make_ready(known, prepared, layer, x)
        return out


def _alone(site: Site, context: torch.Tensor) -> Call | None:
    """The call that stands for a UNet's where a layer is called directly."""
    whose = _whose(site, context)
    return None if whose is None else Call(site, *whose)


def _is_left_out(site: Site) -> bool:
    """True if a call becomes an exported program, which has nothing of memkern.

    Raises:
        RuntimeError: keys and values should have been edited in it.
    """
    if is_exported() and site.edits_kv:
        raise RuntimeError(
            "memkern: edits of keys and values are not part of an exported program; take a policy of the embeds "
            "stage, or call memkern.unpatch(pipe) first"
        )
    return is_exported()


def _find_missed(call: Call, module: Any) -> None:
    """Find layers that a call of `module` should have edited and did not, and sizes that no layer has.

    Raises:
        UnmitigatedError: there are some, and `on_unknown` is "raise".
    """
    session, known, prefix = call.session, call.known, call.site.prefix
    assert known is not None
    assert known.edits is not None
    assert known.rows is not None
    missed = missed_layers(module, prefix, known.edits, call.place, call.reached, call.causes)
    absent = sorted(known.edits.sizes(call.place) - call.sizes) if not prefix else []
    session.unreached.update(missed)
    session.unreached.update({f"size {size}": "no layer of the call has it" for size in absent})
    if (missed or absent) and not prefix:
        count(session, known.rows, shortfall=True)
    if missed:
        name, *others = missed
        more = f" and {len(others)} more" if others else ""
        session.unmitigated(
            f"keys and values of {len(missed)} cross-attention layers were not edited: {name}{more}: {missed[name]}"
        )
    if absent:
        session.unmitigated(f"no cross-attention layer of this call has the size {', '.join(absent)}")


def _whose(site: Site, context: Any = None) -> tuple[Session, bool] | None:
    """The session of a call, and whether that is outside any call of a pipeline; None if no patched pipeline has it."""
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
