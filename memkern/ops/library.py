"""The `memkern` operator namespace: schemas, fakes, autograd and the torch reference live in Python.

C++ only adds implementations for its dispatch key, so the package imports, traces and passes its tests
without a compiled part. The reference is registered for every device and is the executable definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("memkern", "DEF")


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Any:
    """Define `memkern::<name>` from its schema and return its overload packet."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"memkern::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"memkern::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.memkern, name).default
