"""Messages between the server and its worker: lines of JSON.

To the worker: a `Job` under its number, or the number of one to cancel. From the worker: `{"ready": true}` once it has
warmed up, `{"failed": reason}` where it cannot start, and an `Answer` under the number of each job.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["image", "unedited", "refused", "cancelled", "failed"]


@dataclass(frozen=True)
class Job:
    """One image to generate.

    Attributes:
        prompt: the words; None where `prompt_embeds` stand in their place.
        prompt_embeds: embeddings made elsewhere, `[tokens, width]`.
        policy: one of the allow-list, in its words.
        request_id: that of its request, for the worker's log.
    """

    prompt: str | None
    policy: str
    seed: int
    steps: int
    guidance: float
    negative_prompt: str = ""
    prompt_embeds: list[list[float]] | None = None
    request_id: str = ""


@dataclass(frozen=True)
class Report:
    """Numbers of memkern's record of a call: rows by outcome, and bytes kept."""

    policy: str
    protected: int = 0
    exempt: int = 0
    unedited: int = 0
    refused: int = 0
    kept: int = 0

    @property
    def rows(self) -> str:
        """The counts in words, as the header `X-Memkern-Rows` has them."""
        return f"{self.protected} protected, {self.exempt} exempt, {self.unedited} unedited, {self.refused} refused"


@dataclass(frozen=True)
class Answer:
    """The outcome of a job.

    Attributes:
        kind: "image"; "unedited" where memkern refused it; "refused" where the job is at fault; "cancelled"; "failed"
            where the worker is at fault.
        reason: in words, where there is no image.
        image: a PNG.
        seconds: in the pipeline.
    """

    kind: Kind
    report: Report
    reason: str = ""
    image: bytes = b""
    seconds: float = 0.0


def line(**message: Any) -> bytes:
    """A message as a line."""
    return json.dumps(message).encode() + b"\n"


def write_job(number: int, job: Job) -> bytes:
    """A job as a line."""
    return line(number=number, job=asdict(job))


def write_answer(number: int, answer: Answer) -> bytes:
    """An answer as a line."""
    return line(number=number, answer={**asdict(answer), "image": base64.b64encode(answer.image).decode()})


def read_job(message: dict[str, Any]) -> Job:
    """The job of a message."""
    return Job(**message["job"])


def read_answer(message: dict[str, Any]) -> Answer:
    """The answer of a message."""
    given = message["answer"]
    return Answer(**{**given, "report": Report(**given["report"]), "image": base64.b64decode(given["image"])})
