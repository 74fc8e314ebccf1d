"""`python -m examples.server`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import uvicorn

from . import logs
from .app import create_app
from .settings import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM, then finish the images in progress. Returns the exit status."""
    settings = parse(arguments)
    logs.set_up()

    def end() -> None:
        server.should_exit = True

    app = create_app(settings, end)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=int(settings.timeout) + 1,
        )
    )
    listening = server.config.bind_socket()
    listening.listen(server.config.backlog)  # from now on, requests are answered
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    logging.getLogger("server").info("listening", extra={"url": url})
    server.run(sockets=[listening])
    if app.state.pool.failure:
        print(f"{app.title}: {app.state.pool.failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
