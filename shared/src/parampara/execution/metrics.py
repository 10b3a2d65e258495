"""Prometheus metrics of a worker."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

JOBS = Counter("parampara_jobs", "Attempts that ended, by kind of job and how.", ["kind", "outcome"])
ATTEMPT_SECONDS = Histogram(
    "parampara_attempt_seconds", "How long an attempt took.", ["kind"], buckets=(1, 5, 15, 60, 300, 900, 3600, 14400, 43200, float("inf"))
)
RUNNING = Gauge("parampara_jobs_running", "Attempts that this worker runs now.", ["kind"])
HEARTBEAT_AGE = Gauge("parampara_heartbeat_age_seconds", "Seconds since the lease of the running attempt was renewed; 0 while none runs.")
STEP = Gauge("parampara_stage_step", "Newest step of the running stage.", ["kind"])
LOSS = Gauge("parampara_stage_loss", "Newest loss of the running stage.", ["kind"])
