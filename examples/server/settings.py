"""Settings of the server, from the command line; the worker gets the same."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

EMBEDDED = "embedded"
POLICIES = ("swap-pad-zero-eot", "swap-pad", "zero-pad:0.4", "zero-pad:0.7")


@dataclass(frozen=True)
class Settings:
    """The operator's settings.

    Attributes:
        model: "embedded", a diffusers folder or hub name, or a `.safetensors` file.
        policies: the allow-list, in the very words that requests use; the first is the default. "none", unprotected
            by choice, is not among them unless it is named.
        host, port: where the server listens; port 0 is any free one.
        threads: images that are generated at the same time.
        torch_threads: threads of torch for each of them; 0 shares the processors evenly.
        queue: requests that wait for a thread; one more is answered with 503.
        timeout: seconds after which a request is given up, waiting included.
        grace: seconds that the worker has to stop what was given up, before it is killed: longer than a step takes.
        steps, max_steps: denoising steps of an image, by default and at most.
        max_prompt: characters of a prompt.
        max_body: bytes of a request.
    """

    model: str = EMBEDDED
    policies: tuple[str, ...] = POLICIES
    host: str = "127.0.0.1"
    port: int = 8000
    threads: int = 2
    torch_threads: int = 0
    queue: int = 16
    timeout: float = 120.0
    grace: float = 60.0
    steps: int = 20
    max_steps: int = 50
    max_prompt: int = 1000
    max_body: int = 2 * 2**20

    def __post_init__(self) -> None:
        least = {"threads": 1, "steps": 1, "max_prompt": 1, "max_body": 1, "queue": 0, "torch_threads": 0, "port": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}: expected at least {value}, got {getattr(self, name)}")
        for name in ("timeout", "grace"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a number of seconds above 0, got {getattr(self, name)}")
        if self.max_steps < self.steps:
            raise ValueError(f"max_steps: expected at least the default of {self.steps} steps, got {self.max_steps}")
        if not self.policies:
            raise ValueError("policies: expected at least one")

    @property
    def processors(self) -> int:
        """Threads of torch for each image."""
        return self.torch_threads or max(1, (os.cpu_count() or 1) // self.threads)

    def as_json(self) -> str:
        """The settings as JSON, for the worker's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Settings from the text that `as_json` wrote."""
        given = json.loads(text)
        return cls(**{**given, "policies": tuple(given["policies"])})


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """The settings of a command line; exits with a message if one is wrong."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m examples.server", description="Serves images of one patched pipeline over HTTP."
    )

    def option(name: str, about: str) -> None:
        value = getattr(default, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{about} (default: %(default)s)"
        )

    option("model", "embedded, a diffusers folder or hub name, or a .safetensors file")
    allowed = f"a policy that requests may ask for, several times; the first is the default ({', '.join(POLICIES)})"
    parser.add_argument("--policy", action="append", dest="policies", metavar="POLICY", help=allowed)
    option("host", "where to listen")
    option("port", "0 is any free one")
    option("threads", "images at the same time")
    option("torch_threads", "threads of torch for each image; 0 shares the processors evenly")
    option("queue", "requests that wait; one more is answered with 503")
    option("timeout", "seconds for a request, waiting included")
    option("grace", "seconds for the worker to stop what was given up")
    option("steps", "denoising steps where a request names none")
    option("max_steps", "denoising steps at most")
    option("max_prompt", "characters of a prompt at most")
    option("max_body", "bytes of a request at most")
    given = vars(parser.parse_args(arguments))
    given["policies"] = tuple(dict.fromkeys(given["policies"] or POLICIES))
    try:
        return Settings(**given)
    except ValueError as error:
        parser.error(str(error))
