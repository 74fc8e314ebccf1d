"""`examples/server` under load: every image is that of its own request alone, and no memory is lost."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

pytest.importorskip("fastapi", reason="the server's requirements are not installed")
pytest.importorskip("prometheus_client", reason="the server's requirements are not installed")

import psutil
from running import POLICIES, alone, running, soon

from memkern import demo

CLIENTS = 64
PROMPTS = [demo.memorized()[0][0], *demo.ordinary()[:3]]
SEEDS = (0, 1, 2)
MIB = 2**20
NOISE = {
    "malformed": (b'{"prompt": "a cat", ', 400),
    "too many tokens": ({"prompt": "a cat " * 40}, 422),
    "too many bytes": ({"prompt": "a" * 3 * MIB}, 413),
    "an unknown policy": ({"prompt": "a cat", "policy": "unprotected"}, 422),
    "raw embeddings": ({"prompt_embeds": [[0.5] * 128] * 77}, 422),
}


@dataclass(frozen=True)
class Sample:
    """Both processes after `served` images: resident bytes and processor time."""

    served: int
    pid: int
    server_bytes: int
    worker_bytes: int
    server_seconds: float
    worker_seconds: float


class Load:
    """Clients that ask until each of their requests is served, and faulty ones.

    Args:
        server: the server under load.
        requests: each is one image.
        noise: how many times each of `NOISE` is sent among them; as many clients hang up.
        kill_after: images after which the worker is killed; None does not.
    """

    def __init__(self, server, requests, *, noise, kill_after=None):
        self.server, self.requests, self.noise, self.kill_after = server, requests, noise, kill_after
        self.replies, self.errors, self.seconds = [None] * len(requests), Counter(), []
        self.samples, self.wrong_noise = [], []
        self._lock, self._served = threading.Lock(), 0

    def run(self):
        """Run all clients; raises the first error that one of them should not have met."""
        jobs = [lambda index=index: self._ask(index) for index in range(len(self.requests))]
        jobs += [lambda one=one: self._disturb(*one) for one in NOISE.values() for _ in range(self.noise)]
        jobs += [self._hang_up] * self.noise
        random.Random(0).shuffle(jobs)
        began = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as clients:
            for job in [clients.submit(job) for job in jobs]:
                job.result()
        self.wall = time.monotonic() - began
        return self

    def _ask(self, index):
        began = time.monotonic()
        while True:
            reply = self.server.post(self.requests[index])
            if reply.status != 503:
                break
            self._later(reply)
        with self._lock:
            self.replies[index] = reply
            self.seconds.append(time.monotonic() - began)
            self._served += 1
            if self._served == self.kill_after:
                self.server.worker.kill()
            if self._served % 50 == 0:
                self._weigh()

    def _later(self, reply):
        """Wait until the server says to retry, a little apart from the others."""
        with self._lock:
            self.errors[reply.json["error"]] += 1
        time.sleep(int(reply.headers["retry-after"]) * random.uniform(0.5, 1))

    def _disturb(self, body, status):
        while (reply := self.server.post(body)).status == 503:
            self._later(reply)
        if reply.status != status:
            self.wrong_noise.append((status, reply.status, reply.body[:200]))

    def _hang_up(self):
        with self.server.hanging(self.requests[0]):
            time.sleep(random.uniform(0, 0.5))

    def _weigh(self):
        """A `Sample`, where there is a worker at the moment."""
        with contextlib.suppress(IndexError, psutil.NoSuchProcess):
            server, worker = psutil.Process(self.server.process.pid), self.server.worker
            times = [sum(one.cpu_times()[:2]) for one in (server, worker)]
            self.samples.append(
                Sample(self._served, worker.pid, server.memory_info().rss, worker.memory_info().rss, *times)
            )

    @property
    def last_worker(self):
        """The samples of the last worker, from its hundredth image or so on."""
        pid = self.samples[-1].pid if self.samples else None
        return [sample for sample in self.samples if sample.pid == pid][2:]


def draw(number, prompts, seeds):
    """That many requests; every policy, prompt and seed in turn, shuffled."""
    every = itertools.cycle(itertools.product(POLICIES, prompts, seeds))
    requests = [
        {"policy": policy, "prompt": prompt, "seed": seed} for policy, prompt, seed in itertools.islice(every, number)
    ]
    random.Random(number).shuffle(requests)
    return requests


def assert_right(load, before, *, deaths):
    """Each image is its own request's; memkern counted all of them as protected, or as exempt where that was asked."""
    different = {json.dumps(request): alone(request) for request in load.requests}
    for one, other in itertools.combinations(different.values(), 2):
        assert abs(one - other).max() > 8, "an image could pass for another's"
    wrong = [
        request
        for request, reply in zip(load.requests, load.replies, strict=True)
        if not alone.is_image_of(reply, request)
    ]
    assert not wrong, f"{len(wrong)} of {len(load.requests)}: {wrong[:3]}"
    assert load.wrong_noise == []
    for request, reply in zip(load.requests, load.replies, strict=True):
        protected = int(request["policy"] != "none")
        assert reply.headers["x-memkern-policy"] == request["policy"]
        assert reply.headers["x-memkern-rows"].startswith(f"{protected} protected, {1 - protected} exempt, 0 unedited")
    soon(lambda: load.server.count("memkern_places", "generating") == 0, "all is done")
    load.server.logged(*load.replies)
    after = load.server.metrics()
    for policy in POLICIES:
        asked = sum(request["policy"] == policy for request in load.requests)
        # Some of the clients that hang up do so when their image is finished.
        assert asked <= after.since(before, "memkern_requests_total", policy, "200") <= asked + load.noise
        outcomes = ("protected", "exempt", "unedited", "refused")
        rows = {outcome: after.since(before, "memkern_rows_total", policy, outcome) for outcome in outcomes}
        good, other = ("exempt", "protected") if policy == "none" else ("protected", "exempt")
        # Requests that ended with a worker, or with their client, were counted as far as they got.
        assert asked <= rows[good] <= asked + load.noise
        assert (rows[other], rows["unedited"]) == (0, 0)
        assert rows["refused"] == (load.noise if policy == POLICIES[0] else 0)
    assert after.since(before, "memkern_worker_starts") == deaths
    assert load.errors["full"] > 0, "the queue was never full"
    assert load.errors["worker_lost"] >= deaths


def assert_flat(load, most=16 * MIB):
    """Resident bytes of both processes stay within bounds, once the last worker has served a while."""
    samples = load.last_worker
    assert len(samples) >= 4
    for name in ("server_bytes", "worker_bytes"):
        sizes = [getattr(sample, name) for sample in samples]
        print(f"{name}: {sizes[0] / MIB:.0f} MiB, grown by {(max(sizes) - sizes[0]) / MIB:.1f} at the most")
        assert max(sizes) - sizes[0] <= most, f"{name} grew: {[round(size / MIB) for size in sizes]}"


def tell(load):
    """The figures of the site's page."""
    seconds = sorted(load.seconds)
    median, late = seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.95)]
    print(
        f"{len(seconds)} images in {load.wall:.1f} s, {len(seconds) / load.wall:.1f} a second; "
        f"until served, waiting included: median {median:.2f} s, 95 % {late:.2f} s; "
        f"asked to retry: {json.dumps(load.errors)}"
    )
    if load.last_worker:
        first, last = load.last_worker[0], load.last_worker[-1]
        images = max(1, last.served - first.served)
        server, worker = last.server_seconds - first.server_seconds, last.worker_seconds - first.worker_seconds
        print(
            f"processor time of an image: server {1e3 * server / images:.1f} ms, worker {1e3 * worker / images:.1f} ms"
        )


def test_60_requests_of_64_clients():
    with running("--queue", "16") as server:
        before = server.metrics()
        load = Load(server, draw(60, PROMPTS[:2], SEEDS[:2]), noise=3).run()
        tell(load)
        assert_right(load, before, deaths=0)


@pytest.mark.slow
def test_1000_requests_of_64_clients():
    """The same, with a worker that is killed in the middle."""
    with running("--queue", "32") as server:
        before = server.metrics()
        load = Load(server, draw(1000, PROMPTS, SEEDS), noise=20, kill_after=300).run()
        tell(load)
        assert_right(load, before, deaths=1)
        assert_flat(load)
