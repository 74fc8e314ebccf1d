"""The `memkern` operator namespace: schemas, fakes, autograd and the torch reference live in Python.

Compiled parts only add implementations, so the package imports, traces and passes its tests without them. The
reference is registered for every device and is the executable definition. The C++ library takes the CPU's
dispatch key; on a GPU two backends can serve an operator, so its key belongs to a chooser (`backends.run`), and
each named backend has its own namespace with the same schemas: `memkern_cuda`, `memkern_triton`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import backends

_MAIN = torch.library.Library("memkern", "DEF")
_NAMED = {name: torch.library.Library(f"memkern_{name}", "DEF") for name in ("cuda", "triton")}


class Operator:
    """One operator under every backend: `operator(backend, *arguments)`."""

    def __init__(self, overloads: dict[str, Callable[..., Any]]) -> None:
        self._overloads = overloads

    def __call__(self, backend: str, *arguments: Any) -> Any:
        """Run it; `backend` was found usable by `backends.require`."""
        return self._overloads[backend](*arguments)


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    kernels: Sequence[str],
    cpu: Callable[..., Any] | None = None,
) -> Operator:
    """Define `memkern::<name>` from its schema, and the same for each of the named GPU backends in `kernels`.

    `cpu` is an operator's implementation on the CPU that Python composes from parts of the CPU library.
    """
    name = schema.partition("(")[0]
    backends.serve(name, ("torch", *kernels))

    def define(library: torch.library.Library, namespace: str) -> Callable[..., Any]:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup_context, lib=library)
        overload: Callable[..., Any] = getattr(getattr(torch.ops, namespace), name).default
        return overload

    overloads = {"auto": define(_MAIN, "memkern"), "torch": reference}
    overloads["cpp"] = overloads["auto"]
    _MAIN.impl(name, reference, "CompositeExplicitAutograd")
    if cpu is not None and not backends.installed("cpp"):
        _MAIN.impl(name, cpu, "CPU")
    overloads |= {backend: define(_NAMED[backend], f"memkern_{backend}") for backend in kernels if backend in _NAMED}
    if "triton" in kernels:
        for key in ("CUDA", "CPU") if backends.INTERPRETING else ("CUDA",):
            _NAMED["triton"].impl(name, lambda *arguments: backends.run_triton(name, *arguments), key)
    _MAIN.impl(name, lambda *arguments: backends.run(name, overloads, *arguments), "CUDA")
    return Operator(overloads)
