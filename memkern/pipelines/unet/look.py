"""The check of the rows that reach the UNet: who made them, and whether all were edited."""

from __future__ import annotations

from ...ledger import KnownRow, KnownRows
from ..session import Session


def judge(session: Session, rows: KnownRows, *, direct: bool) -> None:
    """Raise, warn or pass, as the session's `on_unknown` says, if some of `rows` should have been edited and were not.

    Args:
        direct: whether the UNet was called outside any call of the pipeline, where each row follows its own policy.
    """
    settings = session.settings
    strangers, others = rows.count(None), [] if direct else [row for row in rows if row and not _serves(session, row)]
    if not settings.edits:
        return
    for row in others:
        session.outcome(row, "unedited")
    session.strangers(strangers)
    if strangers:
        session.unmitigated(
            f"{strangers} of {len(rows)} rows that the UNet reads were not made by the pipeline's encode_prompt: "
            "another tool changed them, they came as raw prompt_embeds, or another pipeline that shares the UNet made "
            "them (patch that one too)"
        )
    if others:
        made = "edited" if others[0].stage == "embeds" else "encoded for the kv stage"
        session.unmitigated(
            f"{len(others)} of {len(rows)} rows that the UNet reads were {made} as {others[0].branch} under "
            f"'{others[0].policy}', while '{settings.policy}' is in force: a cache of embeddings, or an update since"
        )


def _serves(session: Session, row: KnownRow) -> bool:
    # Rows that go through unedited were reported when they were encoded.
    return row.unedited or session.settings.serves(row)


def count(session: Session, rows: KnownRows, *, shortfall: bool = False) -> None:
    """Count the rows that reached the UNet: those of prompts, and all that went unedited.

    Args:
        shortfall: whether layers that should have edited the rows did not.
    """
    for row in rows:
        if row is None:
            continue
        if row.unedited or (shortfall and row.stage == "kv" and row.policy.edits_on(row.branch)):
            session.outcome(row, "unedited")
        elif row.branch == "cond":
            session.outcome(row, "protected" if row.policy.touches("cond") else "exempt")
