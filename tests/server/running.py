"""The real server in a process of its own, and clients of it."""

from __future__ import annotations

import http.client
import io
import json
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import memkern
from memkern import demo

ROOT = Path(__file__).parents[2]
POLICIES = ("swap-pad-zero-eot", "zero-pad:0.7", "prompt-from-eot", "ren:1.25", "none")
"""Edits of embeddings, one of logits, and unprotected by choice."""
STEPS = 4
WAIT = 180
"""Seconds after which a server is given up."""


@dataclass(frozen=True)
class Reply:
    """A client's reply."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def pixels(self):
        return pixels(Image.open(io.BytesIO(self.body)))


def pixels(image):
    return np.asarray(image.convert("RGB"), dtype=np.int16)


def soon(condition, what, seconds=WAIT):
    """Wait until `condition()` is true, and return its value."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return found


class Numbers:
    """The metrics as Prometheus reads them."""

    def __init__(self, text):
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        self._values = {(sample.name, frozenset(sample.labels.values())): sample.value for sample in samples}

    def of(self, name, *labels):
        """One of the metrics, by the values of its labels; 0 where it has not been counted yet."""
        return self._values.get((name, frozenset(labels)), 0)

    def since(self, before, name, *labels):
        """The growth of a metric since `before`."""
        return self.of(name, *labels) - before.of(name, *labels)


class Server:
    """A running server.

    Attributes:
        process: the one that was started.
        early: path → its answer before it was ready.
    """

    def __init__(self, process, log):
        self.process, self._log, self.early = process, log, {}
        self.port = int(soon(self._url, "the server listens").rsplit(":", 1)[1])

    def _url(self):
        assert self.process.poll() is None, self._log.read_text()
        return next((line["url"] for line in self.logs() if line["message"] == "listening"), None)

    def logs(self):
        """The lines of its log that are complete."""
        return [json.loads(line) for line in self._log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def logged(self, *replies):
        """The log's lines of these requests; they, and what is counted, may come a moment after the replies."""
        ids = [reply.headers["x-request-id"] for reply in replies]

        def lines():
            known = {line["request_id"]: line for line in self.logs() if line["message"] == "request"}
            return known.keys() >= set(ids) and [known[one] for one in ids]

        return soon(lines, "the requests are logged")

    def ask(self, method, path, body=None, headers=None):
        """Send one request, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            names = {name.lower(): value for name, value in reply.getheaders()}
            return Reply(reply.status, names, reply.read())
        finally:
            connection.close()

    def get(self, path):
        return self.ask("GET", path)

    def post(self, body):
        """Ask for an image; bytes are sent as they are."""
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", "/v1/images", sent, {"Content-Type": "application/json"})

    @contextmanager
    def hanging(self, body):
        """Ask for an image and do not wait for it; the client hangs up at the end of the block."""
        sent = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", self.port), WAIT) as line:
            head = (
                f"POST /v1/images HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}"
            )
            line.sendall(head.encode() + b"\r\n\r\n" + sent)
            yield line

    @property
    def is_ready(self):
        return self.get("/readyz").status == 200

    @property
    def worker(self):
        """The process with the pipeline."""
        return psutil.Process(self.process.pid).children()[0]

    def metrics(self):
        """All metrics, now."""
        return Numbers(self.get("/metrics").body.decode())

    def count(self, name, *labels):
        """One of the metrics, now."""
        return self.metrics().of(name, *labels)


@contextmanager
def running(*options):
    """A server of the embedded model that is ready; `options` are added to its command line."""
    policies = [word for policy in POLICIES for word in ("--policy", policy)]
    command = [sys.executable, "-m", "examples.server", "--port", "0", "--torch-threads", "1", "--steps", str(STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen([*command, *policies, *options], cwd=ROOT, stdout=file, stderr=file)
        try:
            server = Server(process, log)
            server.early = {path: server.get(path) for path in ("/healthz", "/readyz")}
            server.early["/v1/images"] = server.post({"prompt": "a cat"})
            soon(lambda: server.is_ready, "the server is ready")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(30)
            finally:
                process.kill()


class Alone:
    """Images of pipelines of one policy each, that serve one request after the other."""

    def __init__(self):
        self._known, self._pipes = {}, {}

    def __call__(self, request):
        policy, prompt, seed = request["policy"], request["prompt"], request["seed"]
        if policy not in self._pipes:
            pipe = self._pipes[policy] = demo.load()
            pipe.set_progress_bar_config(disable=True)
            if policy != "none":
                memkern.patch(pipe, policy)
        if (policy, prompt, seed) not in self._known:
            generator = torch.Generator().manual_seed(seed)
            options = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "generator": generator}
            self._known[policy, prompt, seed] = pixels(self._pipes[policy](prompt, **options).images[0])
        return self._known[policy, prompt, seed]

    def is_image_of(self, reply, request):
        """True if a reply is the image of that request, to a level of rounding."""
        return reply.status == 200 and bool(np.abs(reply.pixels - self(request)).max() <= 1)


alone = Alone()
