"""The measurements of a pipeline: times with their ratios, memory, and the choices of layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .turns import Spread

MEASURES = {
    "step": "one call of the UNet as the pipeline makes it in a denoising step, with classifier-free guidance if it "
    "has that; the same latents and context each time, after the calls in which kept tensors are made",
    "encode": "one call of encode_prompt, with the arguments that the pipeline gives it",
    "host": "on a GPU: until a step's call returns, with the GPU idle before it; on a CPU: the step with "
    "latents cut to the smallest that the UNet takes, which leaves Python, dispatch and the reading of weights",
    "peak": "the most bytes of tensors that one step holds, beyond weights and kept tensors",
    "kept": "bytes of the tensors that are kept of the context from step to step",
    "ratio": "the time divided by the unpatched pipeline's in the same round; median and quartiles over rounds",
}
"""Measure → its description."""


@dataclass(frozen=True)
class Timed:
    """The times of one call.

    Attributes:
        rounds: milliseconds, a value per round.
        unpatched: the unpatched pipeline's times in the same rounds; None for its own.
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
        """The JSON form: "rounds_ms", and the quartiles "ms" and "ratio"."""
        ratio = self.ratio
        return {
            "ms": self.spread._asdict(),
            "ratio": None if ratio is None else ratio._asdict(),
            "rounds_ms": list(self.rounds),
        }


@dataclass(frozen=True)
class Run:
    """The measurements of one way to run the pipeline.

    Attributes:
        policy: the policy's name; None for the unpatched pipeline.
        compiled: True if its UNet was compiled by torch.
        step, encode, host: see `MEASURES`; None if not measured: a compiled UNet shares its `encode_prompt`
            with an eager one, and has no host time on a CPU.
        peak: bytes; None if torch cannot tell.
        kept: bytes.
        layers: layer → its choice for the context ("choice", in words), and the data it was chosen by.
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
        """The name in tables."""
        return f"{self.policy or 'unpatched'}{', compiled' if self.compiled else ''}"

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        times = {name: getattr(self, name) for name in ("step", "encode", "host")}
        return {
            "policy": self.policy,
            "compiled": self.compiled,
            **{name: None if one is None else one.document() for name, one in times.items()},
            "peak_bytes": self.peak,
            "kept_bytes": self.kept,
            "layers": self.layers,
        }
