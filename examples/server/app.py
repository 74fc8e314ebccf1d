"""The HTTP server: images, policies, health, readiness and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from . import errors
from .body import ImageRequest, job_of
from .errors import Refusal
from .messages import Answer, Job
from .metrics import Metrics
from .middleware import IMAGES, Around
from .pool import Pool, Unavailable
from .settings import Settings

HUNG_UP = 499
"""The status in logs and metrics, as in nginx, of a request whose client hung up; no client reads the answer."""

STATUSES = {"unedited": 422, "refused": 422, "failed": 500}


def create_app(settings: Settings, on_end: Callable[[], None] = lambda: None) -> FastAPI:
    """The application.

    Args:
        settings: the operator's settings.
        on_end: called when the first worker cannot start; `app.state.pool.failure` says why.
    """
    metrics = Metrics(settings.policies)
    pool = Pool(settings, metrics.answered, on_end)
    metrics.watch(pool)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        pool.start()
        yield
        await pool.close()

    app = FastAPI(title="memkern", lifespan=lifespan)
    app.state.pool = pool
    app.add_middleware(Around, settings=settings, metrics=metrics)
    errors.install(app)

    @app.post(IMAGES, response_class=Response, responses={200: {"content": {"image/png": {}}}})
    async def images(body: ImageRequest, request: Request) -> Response:
        """Generate an image, a PNG. Its policy, rows and seed are in the headers."""
        job = replace(job_of(body, settings), request_id=request.state.id)
        request.state.policy, request.state.seed, request.state.steps = job.policy, job.seed, job.steps
        answer = await unless_hung_up(request, pool.run(job), settings.timeout)
        return Response(status_code=HUNG_UP) if answer is None else image_of(request, job, answer)

    @app.get("/v1/policies")
    async def policies() -> dict[str, Any]:
        """List the policies that a request may name."""
        return {"default": settings.policies[0], "policies": settings.policies}

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Report that the server lives, also while a worker loads: do not restart it for that."""
        return {"status": "alive"}

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        """Report whether images are generated: the worker has warmed up under every policy."""
        if not pool.is_ready:
            raise Unavailable("not_ready", "the worker is loading and warming up", pool.retry_after)
        return {"status": "ready"}

    @app.get("/metrics")
    async def measured() -> Response:
        """Report metrics, for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


async def unless_hung_up(request: Request, work: Coroutine[Any, Any, Answer], timeout: float) -> Answer | None:
    """The answer to a request; None if its client hangs up first. Then, and when time is up, the work is cancelled.

    Raises:
        Refusal: time is up.
    """

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({working, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if gone.done():
            request.state.reason = "the client hung up"
            return None
        raise Refusal(504, "timeout", f"no image after {timeout:g} seconds, waiting included")
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def image_of(request: Request, job: Job, answer: Answer) -> Response:
    """The image, or the reason why there is none."""
    request.state.rows = answer.report.rows
    if answer.kind != "image":
        return errors.answer(request, STATUSES[answer.kind], answer.kind, answer.reason)
    headers = {
        "X-Memkern-Policy": job.policy,
        "X-Memkern-Rows": answer.report.rows,
        "X-Seed": str(job.seed),
        "Cache-Control": "no-store",
    }
    return Response(answer.image, media_type="image/png", headers=headers)
