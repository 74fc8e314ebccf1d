"""The one pipeline, patched, and an image of it under the policy of a job."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable
from queue import LifoQueue
from typing import Any

import torch

import memkern
from memkern.audit import Model, Protocol, load

from .messages import Answer, Job, Kind, Report
from .settings import Settings

WARM_UP = "a warm-up"


class Refused(ValueError):
    """A job that cannot be done as it stands, with the reason."""


class Cancelled(Exception):
    """The end of an image that no client waits for any more."""


class Generator:
    """A patched pipeline that threads share.

    Each call gets a seat: a shallow copy with a scheduler and a tokenizer of its own, because a scheduler counts steps
    and tokenizers are not thread-safe. Weights, hooks and the patch are the same in all of them.

    Args:
        settings: the model, the allow-list, and how many threads call at once.

    Raises:
        ValueError, OSError: there is no such model or policy, or memkern cannot patch the model, with the reasons.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        pipe = load(Model(settings.model), Protocol())
        pipe.set_progress_bar_config(disable=True)
        self._policies = {words: memkern.Policy.parse(words) for words in settings.policies}
        memkern.patch(pipe, self._policies[settings.policies[0]])
        self._seats = [_seat(pipe) for _ in range(settings.threads)]
        self._free: LifoQueue[Any] = LifoQueue()
        for seat in self._seats:
            self._free.put(seat)

    def warm_up(self) -> None:
        """Generate an image with each seat under each policy, so that everything is ready for the first request.

        To be called before `generate`.

        Raises:
            RuntimeError: one of them did not come out protected, or exempt, as its policy says.
        """
        for seat in self._seats:
            for policy in self._policies:
                # Some work begins only with the second step, and some memory is kept only from the third.
                answer = self._on(seat, Job(WARM_UP, policy, seed=0, steps=3, guidance=7.5), lambda: False)
                if answer.kind != "image":
                    raise RuntimeError(f"warm-up: policy {policy!r} {answer.kind}: {answer.reason}")

    def generate(self, job: Job, is_cancelled: Callable[[], bool]) -> Answer:
        """Wait for a seat, then return the image of a job, or the reason why there is none.

        Args:
            is_cancelled: asked after every step.
        """
        seat = self._free.get()
        try:
            return self._on(seat, job, is_cancelled)
        finally:
            self._free.put(seat)

    def _on(self, pipe: Any, job: Job, is_cancelled: Callable[[], bool]) -> Answer:
        records: list[memkern.Record] = []
        began = time.perf_counter()
        kind: Kind
        png = b""
        try:
            with memkern.using(pipe, self._policies[job.policy], report=records.append):
                image = _call(pipe, job, is_cancelled)
            kind, reason = "unedited", _unprotected(records)
            if not reason:
                kind, png = "image", _png(image)
        except memkern.UnmitigatedError as error:
            kind, reason = "unedited", str(error)
        except Refused as error:
            kind, reason = "refused", str(error)
        except Cancelled:
            kind, reason = "cancelled", "no client waits for it"
        return Answer(kind, report_of(job, records), reason, png, time.perf_counter() - began)


def report_of(job: Job, records: list[memkern.Record]) -> Report:
    """The numbers that memkern reported of a job."""
    names = ("protected", "exempt", "unedited", "refused")
    counts = {name: sum(getattr(record, name) for record in records) for name in names}
    return Report(job.policy, **counts, kept=max((record.kept for record in records), default=0))


def _seat(pipe: Any) -> Any:
    seat = copy.copy(pipe)
    seat.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if getattr(pipe, name, None) is not None:
            setattr(seat, name, copy.deepcopy(getattr(pipe, name)))
    return seat


def _call(pipe: Any, job: Job, is_cancelled: Callable[[], bool]) -> Any:
    def look(*_: Any) -> dict[str, Any]:
        if is_cancelled():
            raise Cancelled
        return {}

    if is_cancelled():
        raise Cancelled
    return pipe(
        prompt=None if job.prompt is None else _fitting(pipe, "prompt", job.prompt),
        prompt_embeds=None if job.prompt_embeds is None else _embeds(pipe, job.prompt_embeds),
        negative_prompt=_fitting(pipe, "negative_prompt", job.negative_prompt),
        num_inference_steps=job.steps,
        guidance_scale=job.guidance,
        # On the CPU, so that a seed is the same image on any card.
        generator=torch.Generator("cpu").manual_seed(job.seed),
        callback_on_step_end=look,
    ).images[0]


def _fitting(pipe: Any, name: str, text: str) -> str:
    """`text` if the text encoder reads all of it: diffusers would cut it short and go on."""
    tokenizer = pipe.tokenizer if getattr(pipe, "tokenizer", None) is not None else pipe.tokenizer_2
    most = tokenizer.model_max_length - 2  # the start and the end
    tokens = len(tokenizer(text, truncation=False, add_special_tokens=False).input_ids)
    if tokens > most:
        raise Refused(f"{name}: expected at most {most} tokens, got {tokens}")
    return text


def _embeds(pipe: Any, rows: list[list[float]]) -> torch.Tensor:
    if getattr(pipe, "tokenizer_2", None) is not None:
        raise Refused("prompt_embeds: expected a prompt, since this model reads pooled embeddings as well")
    width = pipe.unet.config.cross_attention_dim
    if {len(row) for row in rows} != {width}:
        came = ", ".join(str(count) for count in sorted({len(row) for row in rows})) or "none"
        raise Refused(f"prompt_embeds: expected rows of {width} numbers, the model's width, got rows of {came}")
    return torch.tensor(rows, dtype=pipe.unet.dtype, device=pipe.device)[None]


def _unprotected(records: list[memkern.Record]) -> str:
    """The reason why an image may not leave although nothing raised; empty if it is protected, or exempt by policy."""
    if not records:
        return "memkern reported nothing of this call"
    for record in records:
        if record.unedited or record.refused or not (record.protected or record.exempt):
            return "; ".join(record.reasons) or f"memkern reported {record}"
    return ""


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
