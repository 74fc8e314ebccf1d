"""Middleware around every request: an id, a limit to its body, a line in the log, and its place in the metrics."""

from __future__ import annotations

import logging
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import Refusal
from .metrics import Metrics
from .settings import Settings

IMAGES = "/v1/images"
PROBES = ("/healthz", "/readyz", "/metrics")
"""Paths that are requested every few seconds: not logged."""

DRAINED = 8
"""Bodies up to this many times the limit are read to their end: a client that still sends reads no answer."""

log = logging.getLogger("server.request")


class Around:
    """An ASGI middleware; see above.

    Args:
        app: the application inside.
        settings: has the limit.
        metrics: of requests for images.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["id"] = secrets.token_hex(8)
        began = time.perf_counter()
        status = 500

        async def answering(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", state["id"].encode())]
            await send(message)

        try:
            await self._app(scope, limited(receive, self._settings.max_body), answering)
        finally:
            self._over(scope, status, time.perf_counter() - began)

    def _over(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        if scope["path"] == IMAGES:
            self._metrics.requested(state.get("policy"), status, seconds)
        elif scope["path"] in PROBES:
            return
        known = {name: state[name] for name in ("policy", "seed", "steps", "rows", "reason") if name in state}
        given = {"request_id": state["id"], "method": scope["method"], "path": scope["path"], "status": status}
        log.info("request", extra={**given, "seconds": round(seconds, 4), **known})


def limited(receive: Receive, most: int) -> Receive:
    """`receive` for bodies of at most `most` bytes.

    Raises, when called:
        Refusal: the body is longer.
    """
    came = 0

    async def receiving() -> Message:
        nonlocal came
        message = await receive()
        came += len(message.get("body", b""))
        if came <= most:
            return message
        while message.get("more_body") and came <= DRAINED * most:
            message = await receive()
            came += len(message.get("body", b""))
        # Bytes that the client has not sent yet are not counted.
        more = "more than " if message.get("more_body") else ""
        raise Refusal(413, "body_too_large", f"body: expected at most {most} bytes, got {more}{came}")

    return receiving
