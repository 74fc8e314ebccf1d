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
    """A request that has come to its first step.

    Attributes:
        step: a call of the UNet as the pipeline makes it, with the same objects each time.
        small: given a side, the same with its latents cut to that; None where they cannot be.
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
        given: what its UNet was called with in that; None before the first.
    """

    def __init__(self, pipe: Any, policy: Policy | None) -> None:
        self.pipe, self.policy = twin(pipe), policy
        self.session: Any = None
        self.given: Arguments | None = None
        self._base = type(self.pipe)
        self._patch = None if policy is None else patch(self.pipe, policy)

    def encoding(self, inputs: dict[str, Any]) -> Arguments:
        """What the pipeline calls its `encode_prompt` with; of an unpatched one.

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
        """A call of its `encode_prompt`."""
        return functools.partial(given.sent, getattr(self.pipe, outputs.method(self.pipe)))

    @contextmanager
    def asked(self, inputs: dict[str, Any], *, compiled: bool = False) -> Iterator[Asked]:
        """A request of it, for the length of a `with` block.

        Args:
            inputs: of the pipeline's call.
            compiled: whether its UNet is compiled by torch.
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
        """A call of the twin, which draws the same numbers each time."""
        drawn = {name: _cloned(value) for name, value in inputs.items()}
        return functools.partial(self._base.__call__, self.pipe, **drawn)

    def close(self) -> None:
        """Take the policy out of the twin."""
        if self._patch is not None:
            self._patch.remove()

    @property
    def kept(self) -> int:
        """Bytes that its last request has kept of contexts."""
        return 0 if self.session is None else self.session.size

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        """Layer → what it did in the last request: "choice" in words, and what that was chosen by."""
        if self.session is None:
            return {}
        shared = {name: {"choice": text} for name, text in self.session.shared.items()}
        return shared | {
            name: {**(asdict(choice) if is_dataclass(choice) else {}), "choice": str(choice)}  # type: ignore[arg-type]
            for name, choice in self.session.layers.items()
        }


def _cloned(value: Any) -> Any:
    """A generator in the state that `value` is in, or a list of them; anything else as it is."""
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return [_cloned(one) for one in value] if isinstance(value, list) else value
