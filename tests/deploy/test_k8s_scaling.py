"""What KEDA asks the database, on a real one: the queries run under the role that is made for them, and count what they should."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psycopg
import pytest

from k8s_checks.objects import Object, of_kind
from parampara.db.models import JOB_STATES
from parampara.plan import QUEUES
from tests.deploy.deployment_files import ROOT

Manifests = dict[str, list[Object]]
ON_THE_CARD = {"train", "quantize", "evaluate"}


@pytest.fixture
def owner(database_url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as connection:
        yield connection


@pytest.fixture
def keda(owner: psycopg.Connection, database_url: str) -> Iterator[psycopg.Connection]:
    """A connection as the role of components/keda/role.sql."""
    sql = (ROOT / "k8s/components/keda/role.sql").read_text(encoding="utf-8")
    statements = "\n".join(line for line in sql.splitlines() if not line.startswith("--")).replace(":'password'", "'secret'")
    owner.execute(statements.encode())
    try:
        with psycopg.connect(database_url.replace("+psycopg", "").replace("postgres@", "keda@"), autocommit=True) as connection:
            yield connection
    finally:
        owner.execute("DROP OWNED BY keda")
        owner.execute("DROP ROLE keda")


def queries(manifests: Manifests, target: str) -> dict[str, str]:
    """What scales each Deployment."""
    return {
        scaler["spec"]["scaleTargetRef"]["name"]: scaler["spec"]["triggers"][0]["metadata"]["query"]
        for scaler in of_kind(manifests[target], "ScaledObject")
    }


def put(owner: psycopg.Connection, jobs: Sequence[tuple[str, str]]) -> None:
    """Jobs by ``(queue, state)``, in place of all that were there."""
    owner.execute("TRUNCATE jobs CASCADE")
    for number, (queue, state) in enumerate(jobs):
        kind = next(kind for kind, its in QUEUES.items() if its == queue)
        values = (f"job_{number}", kind, kind, queue, state)
        owner.execute("INSERT INTO jobs (id, name, kind, queue, state, spec) VALUES (%s, %s, %s, %s, %s, '{}')", values)


def answer(keda: psycopg.Connection, query: str) -> float:
    """KEDA scans one number out of one row."""
    [[value]] = keda.execute(query.encode()).fetchall()
    return float(value)


@pytest.mark.parametrize("target", ["single-gpu", "multi-gpu", "managed-data"])
def test_a_worker_is_there_for_every_queued_and_running_job(
    manifests: Manifests, owner: psycopg.Connection, keda: psycopg.Connection, target: str
) -> None:
    jobs = [(queue, state) for queue in sorted(set(QUEUES.values())) for state in JOB_STATES]
    put(owner, [*jobs, ("train", "queued"), ("train", "waiting")])
    asked = {name: query for name, query in queries(manifests, target).items() if name != "model-server"}
    assert {"trainer", "merger", "quantizer", "evaluator", "ingestor"} <= set(asked)
    for name, query in asked.items():
        assert answer(keda, query) == (3 if name == "trainer" else 2), name
    put(owner, [(queue, state) for queue in sorted(set(QUEUES.values())) for state in ("waiting", "succeeded", "failed", "cancelled")])
    assert {name: answer(keda, query) for name, query in asked.items()} == dict.fromkeys(asked, 0.0), "nothing to do: scaled to none"


@pytest.mark.parametrize("queue", sorted(set(QUEUES.values())))
@pytest.mark.parametrize("state", JOB_STATES)
def test_the_model_server_has_the_one_card_unless_a_run_still_needs_it(
    manifests: Manifests, owner: psycopg.Connection, keda: psycopg.Connection, queue: str, state: str
) -> None:
    query = queries(manifests, "single-gpu")["model-server"]
    put(owner, [])
    assert answer(keda, query) == 1
    put(owner, [("deploy", "queued"), (queue, state)])
    needed = queue in ON_THE_CARD and state in ("waiting", "queued", "running")
    assert answer(keda, query) == (0 if needed else 1)


def test_the_role_sees_nothing_but_queue_and_state(keda: psycopg.Connection) -> None:
    for query in ("SELECT spec FROM jobs", "SELECT * FROM jobs", "SELECT hash FROM api_keys", "UPDATE jobs SET state = 'failed'"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            keda.execute(query.encode())
