"""Scores of memorization: from one or two passes of the UNet on pure noise, and one from a whole generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import patched, probe

SWAPPED = "swap-pad"
LOW_NOISE = -3
"""The index of the low-noise time in the schedule, as in the code of Asthana & Belagiannis."""
ANGLE_WEIGHT = {"epsilon": 2.0, "v_prediction": 0.1}
"""The weights of Asthana & Belagiannis for Stable Diffusion 1.4 and 2."""


class _Reached(Exception):
    """The UNet is about to be called; carries its arguments."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.inputs = kwargs | dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False))


class Passes:
    """The first step of some prompts, all from the noise of one seed, up to the UNet.

    Args:
        pipe: unpatched, with a scheduler that does not change pure noise (DDIM).
        texts: the prompts.
        generators: one for each, of the same seed.
        steps: of the schedule.
    """

    def __init__(self, pipe: Any, texts: Sequence[str], generators: Sequence[torch.Generator], steps: int) -> None:
        self.pipe, self.texts, self.steps = pipe, list(texts), steps
        self._states = [generator.get_state() for generator in generators]
        self._generators = list(generators)
        self._inputs = self._reached()
        self._swapped: dict[str, Any] | None = None
        self._unconditional: dict[int, torch.Tensor] = {}
        self.times: torch.Tensor = pipe.scheduler.timesteps

    @property
    def swapped(self) -> dict[str, Any]:
        """The inputs with the pads re-embedded as "!"."""
        if self._swapped is None:
            with patched(self.pipe, SWAPPED, accelerate=False):
                self._swapped = self._reached()
        return self._swapped

    def unconditional(self, place: int) -> torch.Tensor:
        """The prediction for the shared negative prompt at that place of the schedule, `[1, C, H, W]`."""
        if place not in self._unconditional:
            self._unconditional[place] = self._predicted(self._inputs, slice(0, 1), place)
        return self._unconditional[place]

    def conditional(self, place: int, *, swapped: bool = False) -> torch.Tensor:
        """The predictions for the prompts at that place, `[B, C, H, W]`."""
        inputs = self.swapped if swapped else self._inputs
        return self._predicted(inputs, slice(len(self.texts), None), place)

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A whole generation: the guidance ε(x_t, c) - ε(x_t, ∅) of every step, `[T, B, C, H, W]`, and the last step's
        attention to EOT in the first blocks at full resolution, `[B, h, w]`.
        """
        self._rewind()
        guidance: list[torch.Tensor] = []

        def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
            unconditional, conditional = output[0].float().chunk(2)
            guidance.append(conditional - unconditional)

        handle = self.pipe.unet.register_forward_hook(keep)
        try:
            with probe(self.pipe) as probed:
                self._call(output_type="latent")
        finally:
            handle.remove()
        return torch.stack(guidance), probed.last_maps()

    def _call(self, **options: Any) -> None:
        given = {"generator": self._generators, "num_inference_steps": self.steps, "guidance_scale": 7.5}
        self.pipe(self.texts, **given | options)

    def _rewind(self) -> None:
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)

    def _reached(self) -> dict[str, Any]:
        self._rewind()

        def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args, kwargs)

        handle = self.pipe.unet.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._call()
        except _Reached as reached:
            return reached.inputs
        finally:
            handle.remove()
        raise ValueError(f"model: {type(self.pipe).__name__} made an image without its UNet")

    @torch.no_grad()
    def _predicted(self, inputs: dict[str, Any], rows: slice, place: int) -> torch.Tensor:
        own = {name: _rows(value, rows) for name, value in inputs.items()}
        prediction: torch.Tensor = self.pipe.unet(**own | {"timestep": self.times[place], "return_dict": False})[0]
        return prediction.float()


def _rows(value: Any, rows: slice) -> Any:
    if isinstance(value, dict):
        return {name: _rows(one, rows) for name, one in value.items()}
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim else value


def noise(passes: Passes) -> torch.Tensor:
    """Wen et al. (ICLR 2024): the text-conditional noise of the first step, ‖ε(x_T, c) - ε(x_T, ∅)‖."""
    return _norm(passes.conditional(0) - passes.unconditional(0))


def angle(passes: Passes) -> torch.Tensor:
    """Asthana & Belagiannis (ICLR 2026): the norm of the guidance at the first step, and at low noise its angle with
    the unconditional score, as a mean of cosines over positions; both on the same pure noise.
    """
    kind = passes.pipe.scheduler.config.prediction_type
    if kind not in ANGLE_WEIGHT:
        raise ValueError(f"scores: angle is published for {', '.join(ANGLE_WEIGHT)}, this model predicts {kind!r}")
    guidance = passes.conditional(0) - passes.unconditional(0)
    if kind == "v_prediction":
        kept = passes.pipe.scheduler.alphas_cumprod[int(passes.times[0])].item()
        guidance = guidance * kept**0.5 / (1 - kept)
    late = passes.unconditional(LOW_NOISE)
    cosines = torch.nn.functional.cosine_similarity(late, passes.conditional(LOW_NOISE) - late, dim=1)
    return _norm(guidance) + ANGLE_WEIGHT[kind] * cosines.flatten(1).mean(1)


def pads(passes: Passes) -> torch.Tensor:
    """The distance that the first prediction moves when the pads are re-embedded as "!": Kim & No found that pads carry
    memorized images; the score sees this before an image is generated. Ours, not published as a score.
    """
    return _norm(passes.conditional(0) - passes.conditional(0, swapped=True))


def entropy(passes: Passes) -> torch.Tensor:
    """Ren et al. (ECCV 2024): the entropy of the cross-attention over the prompt's positions at the first step, a mean
    over layers of that of the mean attention of heads and queries.
    """
    with probe(passes.pipe) as probed:
        passes.conditional(0)
    masses = torch.stack([record.mass for record in probed.records])
    mean: torch.Tensor = torch.special.entr(masses).sum(-1).mean(0)
    return mean


def bright(passes: Passes) -> torch.Tensor:
    """Chen et al. (ICLR 2025): the guidance where the image ends bright, a mean over the steps of a whole generation.

    (1/T) Σ_t ‖(ε(x_t, c) - ε(x_t, ∅)) ∘ m‖ / mean(m), m the last step's attention to EOT in the first blocks at full
    resolution.
    """
    guidance, ending = passes.whole()
    mask = torch.nn.functional.interpolate(ending[:, None], guidance.shape[-2:], mode="nearest")
    norms = torch.linalg.vector_norm((guidance * mask).flatten(2), dim=2)
    score: torch.Tensor = norms.mean(0) / mask.flatten(1).mean(1)
    return score


SCORES: dict[str, Callable[[Passes], torch.Tensor]] = {
    "pads": pads,
    "angle": angle,
    "noise": noise,
    "entropy": entropy,
    "bright": bright,
}
"""Name → score `[B]` of the prompts; a high score means memorized. "bright" generates whole images."""
DEFAULT_SCORES = ("pads", "angle", "noise")


def _norm(difference: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    return norm
