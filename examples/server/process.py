"""The worker's process as the server sees it: jobs in, answers out, and the moment it dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from . import messages
from .messages import Answer, Job
from .settings import Settings

LINE = 2**28
"""Bytes of an answer at most."""

log = logging.getLogger("server.process")


class Lost(Exception):
    """The worker died before it answered."""


class WorkerProcess:
    """A running worker. Made by `start`; `listen` has to run for as long as it lives.

    Args:
        process: the process, with pipes.
        settings: of the server.
        on_answer: called with each answer, even if nothing waits for it any more.

    Attributes:
        is_ready: true while it lives after its warm-up.
        failure: why it could not start; empty if it could.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, settings: Settings, on_answer: Callable[[Answer], None]
    ) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._in, self._out = process, process.stdin, process.stdout
        self._settings, self._on_answer = settings, on_answer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self.is_ready, self.failure = False, ""

    @classmethod
    async def start(cls, settings: Settings, on_answer: Callable[[Answer], None]) -> WorkerProcess:
        """Start one. It has to load and to warm up before it takes jobs."""
        package = __package__ or ""
        root = Path(__file__).resolve().parents[package.count(".") + 1]
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(settings.processors),
            "TRANSFORMERS_VERBOSITY": "error",  # notices of an import come before anything can be set
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"{package}.worker",
            settings.as_json(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE,
            env={**os.environ, **own},
            start_new_session=True,  # Ctrl-C is the server's to handle
        )
        log.info("worker started", extra={"pid": process.pid})
        return cls(process, settings, on_answer)

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    async def listen(self, on_ready: Callable[[], None]) -> None:
        """Hand on its answers until it ends; then raise `Lost` in everything that still waits."""
        try:
            async for line in self._out:
                message = json.loads(line)
                if "answer" in message:
                    self._hand_on(message["number"], messages.read_answer(message))
                elif "failed" in message:
                    self.failure = message["failed"]
                else:
                    self.is_ready = True
                    on_ready()
        finally:
            self.is_ready = False
            self.kill()
            code = await self._process.wait()
            log.log(logging.INFO if code == 0 else logging.ERROR, "worker ended", extra={"exit_status": code})
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(Lost(f"the worker ended with status {code} in the middle of this image"))
            self._waiting.clear()

    async def run(self, job: Job) -> Answer:
        """Run a job. If cancelled, it makes the worker stop after the present step.

        Raises:
            Lost: the worker died.
        """
        if not self.is_ready:
            raise Lost("the worker ended before this image was begun")
        number = next(self._numbers)
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._in.write(messages.write_job(number, job))
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            self._cancel(number)
            raise

    def kill(self) -> None:
        """End it at once."""
        # asyncio's own method first reads the exit status, and so takes it from the code that waits for it.
        with contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None:
                os.kill(self.pid, signal.SIGKILL)

    def _hand_on(self, number: int, answer: Answer) -> None:
        waiting = self._waiting.pop(number)
        if not waiting.done():
            waiting.set_result(answer)
        self._on_answer(answer)

    def _cancel(self, number: int) -> None:
        if number not in self._waiting or not self.is_ready:
            return
        self._in.write(messages.line(cancel=number))

        def kill_if_stuck() -> None:
            if number in self._waiting:
                log.error("worker does not stop: killed", extra={"job": number})
                self.kill()

        asyncio.get_running_loop().call_later(self._settings.grace, kill_if_stuck)
