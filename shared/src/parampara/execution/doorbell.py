"""The doorbell: Celery messages that carry a job's id and nothing else.

A message only wakes a worker; the row in Postgres decides. So a lost, doubled or late message is harmless, nothing here is
retried, and a broker that is away costs latency only (workers poll the table, the reconciler rings again).
"""

from __future__ import annotations

from datetime import timedelta

from celery import Celery
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session, sessionmaker

from parampara.db.models import Outbox
from parampara.db.session import transaction
from parampara.settings import Settings
from parampara.telemetry import get_logger

TASK = "parampara.run_job"
_log = get_logger(__name__)


def make_app(settings: Settings) -> Celery:
    """The Celery application of every worker and of the control plane; its limits are argued for in docs/architecture.md."""
    app = Celery("parampara", broker=settings.redis.url, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        accept_content=["json"],
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=3,
        broker_transport_options={"socket_timeout": 10, "socket_connect_timeout": 3, "socket_keepalive": True, "max_retries": 0},
    )
    return app


def greet(settings: Settings) -> None:
    """Say at start whether the broker answers. Work goes on without it, so a wrong password would otherwise show only as waiting."""
    try:
        with Redis.from_url(settings.redis.url, socket_connect_timeout=3, socket_timeout=3) as client:
            client.ping()
    except (RedisError, OSError, ValueError) as error:
        _log.warning("the broker does not answer; jobs are found by polling. Is PARAMPARA_REDIS__URL right?", error=str(error))


def ring(app: Celery, sessions: sessionmaker[Session], *, limit: int = 200) -> int:
    """Send every doorbell that is still in the outbox; returns how many went out.

    A broker that is away is logged and otherwise ignored: the rows stay for the next call.
    """
    with transaction(sessions) as session:
        due = session.execute(
            select(Outbox.id, Outbox.job_id, Outbox.queue).where(Outbox.sent_at.is_(None)).order_by(Outbox.id).limit(limit)
        ).all()
    sent: list[int] = []
    try:
        for outbox_id, job_id, queue in due:
            app.send_task(TASK, args=[job_id], queue=queue, retry=False, ignore_result=True)
            sent.append(outbox_id)
    except (OperationalError, RedisError, OSError) as error:
        _log.warning("broker is away; workers find the jobs by polling", error=str(error), unsent=len(due) - len(sent))
    if sent:
        with transaction(sessions) as session:
            session.execute(update(Outbox).where(Outbox.id.in_(sent)).values(sent_at=func.now()))
    return len(sent)


def prune(session: Session, *, keep: timedelta = timedelta(days=1)) -> None:
    """Forget doorbells that were sent long ago."""
    session.execute(delete(Outbox).where(Outbox.sent_at < func.now() - keep))
