"""One way to run a pipeline: a twin of it, patched or not, in the middle of a request."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any, NamedTuple

import torch

from ..pipelines.family import outputs
from ..pipelines.patching import patch
from ..pipelines.requests import request
from ..policy import Policy
from .calls import Arguments, first_encoding, first_step
from .twin import twin

Step = Callable[[], object]


class Asked(NamedTuple):
    """A request that is at its first step.

    Attributes:
        step: a call of the UNet as the pipeline makes it, with the same objects each time.
        small: for a side, the same call with its latents cut to that; None if they cannot be cut.
    """

    step: Step
    small: Callable[[int], Step | None]


class Subject:
    """A twin of a pipeline, unpatched or under a policy.

    Args:
        pipe: the user's pipeline.
        policy: None leaves the twin unpatched.

    Attributes:
        pipe: the twin.
        session: its last request; None without a policy, or before the first.
        given: its UNet's arguments in that request; None before the first.
    """

    def __init__(self, pipe: Any, policy: Policy | None) -> None:
        self.pipe, self.policy = twin(pipe), policy
        self.session: Any = None
        self.given: Arguments | None = None
        self._base = type(self.pipe)
        self._patch = None if policy is None else patch(self.pipe, policy)

    def encoding(self, inputs: dict[str, Any]) -> Arguments:
        """The arguments of the pipeline's call of its `encode_prompt`; for an unpatched twin.

        Raises:
            ValueError: the pipeline cannot be called with `inputs`.
        """
        try:
            return first_encoding(self.pipe, self._call(inputs))
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"inputs: this {self._base.__name__} cannot be called with {', '.join(inputs)}: {error}"
            ) from error

    def encoder(self, given: Arguments) -> Step:
        """A call of the twin's `encode_prompt`."""
        return functools.partial(given.sent, getattr(self.pipe, outputs.method(self.pipe)))

    @contextmanager
    def asked(self, inputs: dict[str, Any], *, compiled: bool = False) -> Iterator[Asked]:
        """A request of the twin, for the length of a `with` block.

        Args:
            inputs: of the pipeline's call.
            compiled: True to compile its UNet by torch.
        """
        # Requests of subjects that take turns do not see each other.
        context = contextvars.copy_context()
        manager = None if self._patch is None else request(self._patch, self.pipe)
        if manager is not None:
            self.session = context.run(manager.__enter__)
        try:
            given = self.given = context.run(first_step, self.pipe, self._call(inputs))
            unet: Any = torch.compile(self.pipe.unet) if compiled else self.pipe.unet

            def step(found: Arguments) -> Step:
                return functools.partial(context.run, found.sent, unet)

            def small(side: int) -> Step | None:
                found = given.cut(side)
                return None if found is None else step(found)

            yield Asked(step(given), small)
        finally:
            if manager is not None:
                context.run(manager.__exit__, None, None, None)

    def _call(self, inputs: dict[str, Any]) -> Step:
        """A call of the twin that draws the same random numbers each time."""
        drawn = {name: _cloned(value) for name, value in inputs.items()}
        return functools.partial(self._base.__call__, self.pipe, **drawn)

    def close(self) -> None:
        """Remove the policy from the twin."""
        if self._patch is not None:
            self._patch.remove()

    @property
    def kept(self) -> int:
        """Bytes of the tensors that its last request keeps of contexts."""
        return 0 if self.session is None else self.session.size

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        """Layer → its choice in the last request: "choice" in words, and the data it was chosen by."""
        if self.session is None:
            return {}
        shared = {name: {"choice": text} for name, text in self.session.shared.items()}
        return shared | {
            name: {**(asdict(choice) if is_dataclass(choice) else {}), "choice": str(choice)}  # type: ignore[arg-type]
            for name, choice in self.session.layers.items()
        }


def _cloned(value: Any) -> Any:
    """A copy of a generator in its present state, or a list of copies; any other value unchanged."""
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return [_cloned(one) for one in value] if isinstance(value, list) else value
