"""JSON documents, read strictly: an error is a ValueError that begins with the names of the fields it is in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def load(text: str) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
        ValueError: it is not text, not JSON or not an object, or an object in it has a field twice or NaN.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected text, the JSON of an object, got {type(text).__name__}")
    try:
        document = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON, got {_short(text)}: {error}") from None
    except RecursionError:
        raise ValueError("expected JSON of a few levels, got one that is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError(f"expected a JSON object, got {_short(document)}")
    return document


def checked(value: object, allowed: tuple[str, ...], required: tuple[str, ...] = ()) -> dict[str, Any]:
    """`value` if it is an object with these fields, or a ValueError that names the one that is wrong."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object with {', '.join(allowed)}, got {_short(value)}")
    for name in value:
        if name not in allowed:
            raise ValueError(f"{name}: unknown field, got {_short(value[name])}; the fields are {', '.join(allowed)}")
    for name in required:
        if name not in value:
            raise ValueError(f"{name}: missing, got {_short(value)}; it is required")
    return value


def listed(name: str, value: object) -> list[Any]:
    """`value` if it is a list, or a ValueError that names it."""
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {_short(value)}")
    return value


@contextmanager
def at(place: str) -> Iterator[None]:
    """Put the name of a field before the message of an error in it, as a ValueError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None


def _once(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name}: expected once, got it twice")
        fields[name] = value
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"expected JSON, which has no {name}")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
