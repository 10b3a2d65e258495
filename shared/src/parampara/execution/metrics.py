"""Prometheus metrics of a worker."""

from __future__ import annotations

import time

from prometheus_client import Counter, Gauge, Histogram

JOBS = Counter("parampara_jobs", "Attempts that ended, by kind of job and how.", ["kind", "outcome"])
ATTEMPT_SECONDS = Histogram(
    "parampara_attempt_seconds", "How long an attempt took.", ["kind"], buckets=(1, 5, 15, 60, 300, 900, 3600, 14400, 43200, float("inf"))
)
RUNNING = Gauge("parampara_jobs_running", "Attempts that this worker runs now.", ["kind"])
HEARTBEAT_AGE = Gauge("parampara_heartbeat_age_seconds", "Seconds since a lease was renewed or, when idle, the table was looked into.")
STEP = Gauge("parampara_stage_step", "Newest step of the running stage.", ["kind"])
LOSS = Gauge("parampara_stage_loss", "Newest loss of the running stage.", ["kind"])

_newest_sign = [time.monotonic()]
HEARTBEAT_AGE.set_function(lambda: time.monotonic() - _newest_sign[0])


def sign_of_life() -> None:
    """The database has just answered this worker: a lease was renewed, or the table looked into."""
    _newest_sign[0] = time.monotonic()
