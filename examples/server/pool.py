"""The pool: limits of images at once and of waiting requests, and a worker that is restarted when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable

from .messages import Answer, Job
from .process import Lost, WorkerProcess
from .settings import Settings

START = 5
"""Seconds that a worker is assumed to need until it is ready."""

PAUSE = 30.0
"""The longest pause, in seconds, between workers that die before they are ready."""

log = logging.getLogger("server.pool")


class Unavailable(Exception):
    """There is no image now; perhaps there is one after `retry_after` seconds.

    Attributes:
        kind: "full", "not_ready" or "worker_lost".
        retry_after: seconds.
    """

    def __init__(self, kind: str, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.kind, self.retry_after = kind, retry_after


class Pool:
    """Seats for requests before one worker.

    The queue is kept here: a worker that dies loses what it was generating, and nothing that waits.

    Args:
        settings: the number of seats, and the settings of the worker.
        on_answer: called with each answer of the worker.
        on_end: called when the first worker cannot start: there is nothing to wait for.

    Attributes:
        generating, waiting: the current numbers of requests.
        starts: the number of workers that were started.
        failure: why the first worker could not start; empty if it could.
    """

    def __init__(
        self, settings: Settings, on_answer: Callable[[Answer], None], on_end: Callable[[], None] = lambda: None
    ) -> None:
        self._settings, self._on_answer, self._on_end = settings, on_answer, on_end
        self._seats = asyncio.Semaphore(settings.threads)
        self._ready = asyncio.Event()
        self._worker: WorkerProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._seconds = 1.0
        self.generating = self.waiting = self.starts = 0
        self.failure = ""

    @property
    def is_ready(self) -> bool:
        """True while a worker that has warmed up lives."""
        return self._ready.is_set()

    @property
    def pid(self) -> int:
        """The worker's process; 0 before there is one."""
        return 0 if self._worker is None else self._worker.pid

    @property
    def retry_after(self) -> int:
        """Seconds until there may be a place: the requests that are here, at the recent pace."""
        if not self.is_ready:
            return START
        return max(1, math.ceil((self.generating + self.waiting) * self._seconds / self._settings.threads))

    def start(self) -> None:
        """Start the worker, and another whenever one dies."""
        self._supervisor = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        """End the worker."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor

    async def run(self, job: Job) -> Answer:
        """Wait for a seat, then for the image. May be cancelled at any time.

        Raises:
            Unavailable: all places are taken, the worker is not ready, or it died.
        """
        if not self.is_ready:
            raise Unavailable("not_ready", "the worker is loading and warming up", self.retry_after)
        settings = self._settings
        if self.generating + self.waiting >= settings.threads + settings.queue:
            reason = f"{self.generating} images are being generated and {self.waiting} requests wait: no place is left"
            raise Unavailable("full", reason, self.retry_after)
        self.waiting += 1
        try:
            await self._seats.acquire()
        finally:
            self.waiting -= 1
        self.generating += 1
        try:
            return await self._generate(job)
        finally:
            self.generating -= 1
            self._seats.release()

    async def _generate(self, job: Job) -> Answer:
        await self._ready.wait()  # a worker may have died while this request was in the queue
        assert self._worker is not None
        began = time.monotonic()
        try:
            answer = await self._worker.run(job)
        except Lost as lost:
            raise Unavailable("worker_lost", f"{lost}; the request may be repeated", self.retry_after) from None
        self._seconds += 0.1 * (time.monotonic() - began - self._seconds)
        return answer

    async def _supervise(self) -> None:
        deaths = 0  # in a row, of workers that were not ready yet
        while True:
            self.starts += 1
            worker = self._worker = await WorkerProcess.start(self._settings, self._on_answer)
            was_ready = False

            def ready() -> None:
                nonlocal was_ready
                was_ready = True
                self._ready.set()
                log.info("ready")

            try:
                await worker.listen(ready)
            except Exception:
                log.exception("the worker's message cannot be read: killed")
            finally:
                self._ready.clear()
            if self.starts == 1 and not was_ready:
                self.failure = worker.failure or "the worker died while it started"
                log.error("the worker cannot start", extra={"reason": self.failure})
                self._on_end()
                return
            deaths = 0 if was_ready else deaths + 1
            await asyncio.sleep(min(2.0**deaths - 1, PAUSE))
