"""Metrics for Prometheus: requests, rows and bytes as memkern reports them, latency, and the state of the pool."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from .messages import Answer
from .pool import Pool

OUTCOMES = ("protected", "exempt", "unedited", "refused")
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
BYTES = tuple(4**power for power in range(6, 17))
NO_POLICY = "-"
"""The label of requests without a policy of the allow-list: names that clients make up do not become labels."""


class Metrics:
    """Numbers since the server was started, in a registry of their own.

    Args:
        policies: the allow-list, the labels.
    """

    def __init__(self, policies: tuple[str, ...]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the lines, and are of no use
        self._registry = own = CollectorRegistry()
        self._requests = Counter("memkern_requests", "Requests for an image", ["policy", "status"], registry=own)
        self._rows = Counter(
            "memkern_rows",
            "Rows of prompts that reached the UNet edited, exempt by their policy or unedited; requests refused",
            ["policy", "outcome"],
            registry=own,
        )
        self._request_seconds = Histogram(
            "memkern_request_seconds", "A request, waiting included", ["policy"], buckets=SECONDS, registry=own
        )
        self._generate_seconds = Histogram(
            "memkern_generate_seconds", "An image in the pipeline", ["policy"], buckets=SECONDS, registry=own
        )
        self._kept = Histogram(
            "memkern_kept_bytes", "Bytes kept of a request's contexts", ["policy"], buckets=BYTES, registry=own
        )
        for policy in policies:  # a rate needs the zero before the first
            self._request_seconds.labels(policy)
            self._generate_seconds.labels(policy)
            self._kept.labels(policy)
            for outcome in OUTCOMES:
                self._rows.labels(policy, outcome)

    def watch(self, pool: Pool) -> None:
        """Show the state of the pool as well."""
        own = self._registry
        ready = Gauge("memkern_ready", "1 while a worker that has warmed up lives", registry=own)
        ready.set_function(lambda: float(pool.is_ready))
        places = Gauge("memkern_places", "Requests in the pool", ["state"], registry=own)
        places.labels("generating").set_function(lambda: float(pool.generating))
        places.labels("waiting").set_function(lambda: float(pool.waiting))
        ProcessCollector(registry=own)
        ProcessCollector("memkern_worker", lambda: pool.pid, registry=own)
        starts = Gauge("memkern_worker_starts", "Workers started; more than one where one died", registry=own)
        starts.set_function(lambda: float(pool.starts))

    def answered(self, answer: Answer) -> None:
        """Count what memkern reported of a job, even if its client has gone."""
        report = answer.report
        for outcome in OUTCOMES:
            self._rows.labels(report.policy, outcome).inc(getattr(report, outcome))
        if answer.kind == "image":
            self._generate_seconds.labels(report.policy).observe(answer.seconds)
            self._kept.labels(report.policy).observe(report.kept)

    def requested(self, policy: str | None, status: int, seconds: float) -> None:
        """Count a request that is over."""
        self._requests.labels(policy or NO_POLICY, str(status)).inc()
        if policy and status == 200:
            self._request_seconds.labels(policy).observe(seconds)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
