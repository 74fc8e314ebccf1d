"""What was measured of a pipeline: times with their ratios, memory, and what layers do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .turns import Spread

MEASURES = {
    "step": "one call of the UNet as the pipeline makes it in a denoising step, with classifier-free guidance where it "
    "has that; the same latents and context each time, after the calls in which kept tensors are made",
    "encode": "one call of encode_prompt, with the arguments that the pipeline gives it",
    "host": "on a GPU: until a step's call returns, the GPU being idle when it is made; on a CPU: the step with "
    "latents cut to the smallest that the UNet takes, which leaves Python, dispatch and the reading of weights",
    "peak": "bytes of tensors that one step holds at the most, beyond weights and what is kept",
    "kept": "bytes that are kept of the context from step to step",
    "ratio": "of the time to the unpatched pipeline's in the same round; median and quartiles over rounds",
}
"""Measure → what it is."""


@dataclass(frozen=True)
class Timed:
    """The times of one call.

    Attributes:
        rounds: milliseconds, a value a round.
        unpatched: the unpatched pipeline's in the same rounds; None for its own.
    """

    rounds: tuple[float, ...]
    unpatched: tuple[float, ...] | None = None

    @property
    def spread(self) -> Spread:
        """Quartiles of the milliseconds."""
        return Spread.of(self.rounds)

    @property
    def ratio(self) -> Spread | None:
        """Quartiles of the ratio to the unpatched pipeline."""
        if self.unpatched is None:
            return None
        return Spread.of([own / other for own, other in zip(self.rounds, self.unpatched, strict=True)])

    def document(self) -> dict[str, Any]:
        """As JSON has it: "rounds_ms", and the quartiles "ms" and "ratio"."""
        ratio = self.ratio
        return {
            "ms": self.spread._asdict(),
            "ratio": None if ratio is None else ratio._asdict(),
            "rounds_ms": list(self.rounds),
        }


@dataclass(frozen=True)
class Run:
    """What was measured of one way to run the pipeline.

    Attributes:
        policy: the policy's name; None for the unpatched pipeline.
        compiled: whether its UNet was compiled by torch.
        step, encode, host: see `MEASURES`; None where it was not measured: a compiled UNet shares its `encode_prompt`
            with an eager one, and has no host time on a CPU.
        peak: bytes; None where torch cannot tell.
        kept: bytes.
        layers: layer → what it does with the context ("choice", in words), and what that was chosen by.
    """

    policy: str | None
    compiled: bool
    step: Timed
    encode: Timed | None
    host: Timed | None
    peak: int | None
    kept: int
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.policy or 'unpatched'}{', compiled' if self.compiled else ''}"

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        times = {name: getattr(self, name) for name in ("step", "encode", "host")}
        return {
            "policy": self.policy,
            "compiled": self.compiled,
            **{name: None if one is None else one.document() for name, one in times.items()},
            "peak_bytes": self.peak,
            "kept_bytes": self.kept,
            "layers": self.layers,
        }
