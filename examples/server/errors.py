"""Errors as clients see them: a status, a word for programs, and a sentence with the given and the expected value."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as RoutingError

from .pool import Unavailable

SHOWN = 80
"""The number of characters of a given value that a message repeats."""


class Refusal(HTTPException):
    """A request that is not served, with its status.

    Args:
        kind: a word for programs.
        reason: the given value and the expected one.
    """

    def __init__(self, status: int, kind: str, reason: str) -> None:
        super().__init__(status, {"error": kind, "reason": reason})


def answer(request: Request, status: int, kind: str, reason: str, headers: dict[str, str] | None = None) -> Response:
    """The answer to a request that is not served; the log of requests gets the reason too."""
    reason = reason.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is valid JSON, and no text
    request.state.reason = reason
    return JSONResponse({"error": kind, "reason": reason, "request_id": request.state.id}, status, headers)


def install(app: FastAPI) -> None:
    """Answer every error in this form."""

    @app.exception_handler(RoutingError)
    async def refused(request: Request, error: RoutingError) -> Response:
        if isinstance(error, Refusal):
            given: Any = error.detail
            return answer(request, error.status_code, given["error"], given["reason"])
        if error.status_code == 400:
            return answer(request, 400, "malformed_json", "body: expected JSON in UTF-8, got bytes that cannot be read")
        headers = dict(error.headers or {})
        what = f"{request.method} {request.url.path}"
        reason = {404: f"there is no {what}", 405: f"there is no {what}, but {headers.get('Allow', 'another method')}"}
        return answer(
            request, error.status_code, "http", reason.get(error.status_code, str(error.detail)), headers or None
        )

    @app.exception_handler(Unavailable)
    async def unavailable(request: Request, error: Unavailable) -> Response:
        return answer(request, 503, error.kind, str(error), {"Retry-After": str(error.retry_after)})

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return answer(request, 500, "failed", f"{type(error).__name__} in the server")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            where = first["loc"][-1]
            reason = f"body: expected JSON, got something else at character {where}: {first['ctx']['error']}"
            return answer(request, 400, "malformed_json", reason)
        return answer(request, 422, "invalid", "; ".join(map(_line, error.errors()[:5])))


def _line(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"] if part != "body")[:SHOWN] or "body"
    came = repr(error.get("input"))
    shown = came if len(came) <= SHOWN else f"{came[:SHOWN]}…"
    if error["type"] == "extra_forbidden":
        return f"{name}: there is no such field"
    if error["type"] == "missing":
        return f"{name}: expected a JSON object, got nothing"
    if error["type"].startswith("model"):
        return f"body: expected a JSON object under Content-Type: application/json, got {shown}"
    return f"{name}: {error['msg'].removeprefix('Input ').removeprefix('Value error, ')}, got {shown}"
