"""The worker's process: jobs come in on stdin, answers go out on stdout, one a line.

    python -m examples.server.worker SETTINGS_AS_JSON

It ends when stdin does, so that it never outlives the server, however that ends.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from . import logs, messages
from .messages import Answer, Report
from .pipeline import Generator
from .settings import Settings

log = logging.getLogger("server.worker")


class Worker:
    """Does jobs in threads, and sends the outcome of each.

    Args:
        generator: the pipeline.
        threads: the number of jobs at once.
        out: where answers go, a binary file.
    """

    def __init__(self, generator: Generator, threads: int, out: Any) -> None:
        self._generator, self._out = generator, out
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="generator")
        self._cancelled: dict[int, threading.Event] = {}
        self._lock = threading.Lock()

    def take(self, message: dict[str, Any]) -> None:
        """Begin a job, or cancel one unless it is done already."""
        if "cancel" in message:
            cancelled = self._cancelled.get(message["cancel"])
            if cancelled is not None:
                cancelled.set()
            return
        self._cancelled[message["number"]] = threading.Event()
        self._threads.submit(self._serve, message)

    def say(self, line: bytes) -> None:
        """Send a line."""
        with self._lock:
            self._out.write(line)
            self._out.flush()

    def _serve(self, message: dict[str, Any]) -> None:
        number = message["number"]
        is_lost = False
        try:
            job = messages.read_job(message)
            try:
                answer = self._generator.generate(job, self._cancelled[number].is_set)
            except Exception as error:
                log.exception("a job failed", extra={"request_id": job.request_id})
                answer = Answer("failed", Report(job.policy), f"{type(error).__name__} in the pipeline")
                # After such an error everything on the device fails: only another process helps.
                is_lost = isinstance(error, getattr(torch, "AcceleratorError", ()))
            self.say(messages.write_answer(number, answer))
        except BrokenPipeError:
            is_lost = True
        finally:
            self._cancelled.pop(number, None)
            if is_lost:
                os._exit(1)


def main() -> None:
    """Load, warm up, and serve until stdin ends."""
    # Text that libraries print must not come between the answers.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logs.set_up()
    logs.quieten()
    settings = Settings.from_json(sys.argv[1])
    torch.set_num_threads(settings.processors)
    try:
        generator = Generator(settings)
        generator.warm_up()
    except Exception as error:
        log.exception("the worker cannot start")
        out.write(messages.line(failed=f"{type(error).__name__}: {error}"))
        out.flush()
        os._exit(1)
    worker = Worker(generator, settings.threads, out)
    worker.say(messages.line(ready=True))
    for line in sys.stdin.buffer:
        worker.take(json.loads(line))
    os._exit(0)  # nothing would read the images in progress


if __name__ == "__main__":
    main()
