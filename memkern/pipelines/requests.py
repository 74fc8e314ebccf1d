"""A call of a patched pipeline from its beginning to its end, and prompts that are encoded outside any call."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from .attached import EXCHANGED
from .patch import Patch
from .prompt.encode_prompt import encode
from .session import Owner, Record, Session, current, entered, log
from .status import edits_of
from .unet.call import CALL


@contextmanager
def request(patch: Patch, pipe: Any) -> Iterator[Session]:
    """A call of a pipeline: it keeps its settings until its end, even if the pipeline is unpatched meanwhile.

    Args:
        pipe: the pipeline that is called.
    """
    session = Session(patch.in_force, pipe, patch)
    sites = patch.sites
    patch.attached.hold(session.settings, needs=session)
    try:
        with entered(session):
            _follow(patch, session)
            yield session
    finally:
        # A UNet that raised has not ended its call.
        CALL.set(None)
        for site in sites:
            site.release(patch, needs=session)
        _finish(patch, session)
        session.close()


def encode_prompt(patch: Patch, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A patched pipeline's `encode_prompt`, in a call of the pipeline or outside."""
    session = current()
    if session is not None and session.patch is cast(Owner, patch):
        return encode(session, patch.family.method, args, kwargs)
    session = patch.begin_direct(pipe)
    try:
        return encode(session, patch.family.method, args, kwargs)
    finally:
        _finish(patch, session)


def _follow(patch: Patch, session: Session) -> None:
    """Report what another tool has taken out; still check the rows that reach an exchanged UNet."""
    lost, settings = patch.lost, session.settings
    if lost is not None:
        again = f"{lost} since it was patched; call memkern.patch(pipe) or patch.update() again"
        if lost == EXCHANGED:
            patch.attached.look_at(patch.pipe)
            session.left_alone["an exchanged UNet"] = None
            if settings.applied == "kv" and settings.edits:
                session.unmitigated(again)
        if lost != patch.told_of and settings.applied == "embeds":
            warnings.warn(f"memkern: {again} to have them accelerated", stacklevel=6)
    patch.told_of = lost


def _finish(patch: Patch, session: Session) -> None:
    """Count a session, log it and report it."""
    record = _record(session)
    patch.tally.add(session.settle())
    patch.last = session
    if not session.encoded and not session.reasons:
        return
    log.info("%s", record)
    if session.settings.report is not None:
        try:
            session.settings.report(record)
        except Exception:
            # An error in it costs neither a finished image nor a refusal.
            log.exception("report raised")


def _record(session: Session) -> Record:
    counts = session.counts
    return Record(
        session.settings.policy,
        session.settings.applied,
        dict(session.encoded),
        edits_of(session),
        counts.protected,
        counts.exempt,
        counts.unedited,
        counts.refused,
        tuple(session.reasons),
        session.size,
    )
