"""A whole run through the protocol: order, artifacts, gates, reuse, cancel and retry of runs."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Text, cast, func, literal_column, select, update

from parampara import manifest
from parampara.db.models import Alias, Artifact, Attempt, Deployment, Event, Job, Model, Outbox
from parampara.db.session import transaction
from parampara.errors import ArtifactDamaged, InvalidRequest, NotFound, WrongState
from parampara.execution import inputs, products
from parampara.execution.queue import enqueue_job, request_cancel, retry_job, retry_run
from parampara.plan import deploy_spec
from parampara.schemas.stages import DeployParams
from parampara.storage import LocalStorage

LINE = ["dapt", "merge_dapt", "sft", "merge", "quantize", "evaluate", "deploy"]


def test_a_run_goes_through_all_stages_and_is_served(queue: Any) -> None:
    run_id = queue.start_run(gates=[{"metric": "exact.sft", "min": 0.4, "action": "fail"}])
    assert list(queue.states(run_id).values()) == ["queued"] + ["waiting"] * 6
    assert queue.work() == [f"{name}:succeeded" for name in LINE]
    run, jobs = queue.the_run(run_id), queue.jobs(run_id)
    assert (run.state, run.gate, run.error) == ("succeeded", "promote", None)
    assert run.started_at is not None
    assert run.finished_at is not None
    assert run.model == f"ft:tiny:parampara:expert:{run_id[4:12]}"
    storage = LocalStorage(queue.settings.artifacts_dir)
    parents = {name: storage.manifest(job.artifact_id).parents for name, job in jobs.items() if job.artifact_id}
    for job in jobs.values():
        if job.artifact_id:
            storage.verify(job.artifact_id)
    assert parents["merge"] == [jobs["dapt"].artifact_id, jobs["sft"].artifact_id]
    assert parents["quantize"] == [jobs["merge"].artifact_id]
    # schemes are held against what the evaluation measures on
    configs = {name: json.loads((queue.settings.work_dir / jobs[name].id / "config.json").read_text()) for name in ("quantize", "evaluate")}
    for key in ("text", "qa", "dapt_params", "sft_params", "seed"):
        assert configs["quantize"][key] == configs["evaluate"][key] is not None, key
    # the adapter of SFT was trained on a merge in the precision of DAPT; the final merge is in the recipe's
    assert "float32" in (storage.path(jobs["merge_dapt"].artifact_id) / "merged.txt").read_text()
    assert "float16" in (storage.path(jobs["merge"].artifact_id) / "merged.txt").read_text()
    with queue.sessions() as session:
        alias = session.get_one(Alias, "kp")
        assert (alias.model, alias.url, alias.active_generation) == (run.model, "http://model:8002", 1)
        assert session.scalars(select(Deployment.status)).all() == ["ready"]
        assert session.get_one(Model, run.model).artifact_id == jobs["quantize"].artifact_id
        assert "output" not in (jobs["dapt"].result or {})
        curve = [
            (point["step"], point["metrics"]["loss"])
            for event in session.scalars(select(Event).where(Event.job_id == jobs["dapt"].id, Event.type == "metrics").order_by(Event.id))
            for point in event.data["points"]
        ]
        assert curve == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    left = sorted(path.name for path in (queue.settings.work_dir / jobs["dapt"].id).iterdir())
    assert left == ["attempt-1.log", "config.json", "lock", "progress.jsonl", "result.json", "trace.jsonl"]


def test_a_run_with_preferences_goes_through_dpo_and_takes_what_a_run_without_has_made(queue: Any) -> None:
    datasets = {"books": [queue.book()], "qa": [queue.upload("{}", "qa.jsonl")]}
    queue.start_run(datasets=datasets)
    queue.work()
    run_id = queue.start_run(datasets={**datasets, "preferences": [queue.upload("{}", "pairs.jsonl")]}, dpo={})
    ended = dict(outcome.split(":") for outcome in queue.work())
    assert list(ended) == ["dapt", "merge_dapt", "sft", "merge_sft", "dpo", "merge", "quantize", "evaluate", "deploy"]
    assert [name for name, outcome in ended.items() if outcome == "reused"] == ["dapt", "merge_dapt", "sft"]
    assert queue.the_run(run_id).state == "succeeded"
    jobs, storage = queue.jobs(run_id), LocalStorage(queue.settings.artifacts_dir)
    merged = (storage.path(jobs["merge"].artifact_id) / "merged.txt").read_text()
    assert [merged.count(f"'{kind} ") for kind in ("dapt", "sft", "dpo")] == [1, 1, 1]
    assert storage.manifest(jobs["dpo"].artifact_id).parents == [jobs["merge_sft"].artifact_id]
    config = json.loads((queue.settings.work_dir / jobs["evaluate"].id / "config.json").read_text())
    assert config["sft_merged"] == str(storage.path(jobs["merge_sft"].artifact_id))
    assert config["dpo_adapter"] == str(storage.path(jobs["dpo"].artifact_id))


def test_every_queued_job_has_its_doorbell_in_the_same_transaction(queue: Any) -> None:
    run_id = queue.start_run()
    queue.work()
    with queue.sessions() as session:
        rows = session.execute(select(Outbox.job_id, cast(literal_column("outbox.xmin"), Text))).tuples().all()
        queued = select(Event.job_id, cast(Event.xid, Text)).where(Event.job_id.is_not(None), Event.data["state"].astext == "queued")
        told = set(session.execute(queued).tuples())
    assert {job_id for job_id, _ in rows} == {job.id for job in queue.jobs(run_id).values()}
    assert set(rows) == told, "written by the transaction that queued the job"


def test_a_second_equal_run_reuses_every_product(queue: Any) -> None:
    datasets = {"books": [queue.book()], "qa": [queue.upload("{}", "qa.jsonl")]}
    first = queue.start_run(datasets=datasets)
    queue.work()
    second = queue.start_run(datasets=datasets)
    assert queue.work() == [f"{name}:reused" for name in LINE[:-1]] + ["deploy:succeeded"]
    old, new = queue.jobs(first), queue.jobs(second)
    for name in LINE[:-1]:
        assert new[name].artifact_id == old[name].artifact_id
        assert new[name].reused_from == old[name].id
        assert new[name].result == old[name].result
    assert queue.the_run(second).model != queue.the_run(first).model
    assert queue.work() == []


def test_a_product_taken_twice_still_names_the_job_that_made_it(queue: Any) -> None:
    datasets = {"books": [queue.book()], "qa": [queue.upload("{}", "qa.jsonl")]}
    made = []
    for _ in range(3):
        run_id = queue.start_run(datasets=datasets)
        claim = queue.claimed()
        assert claim.run_id == run_id
        queue.run(claim)
        made.append(queue.job(claim.job_id))
    assert [job.reused_from for job in made] == [None, made[0].id, made[0].id]


def test_another_seed_or_reuse_false_makes_a_new_product(queue: Any) -> None:
    datasets = {"books": [queue.book()], "qa": [queue.upload("{}", "qa.jsonl")]}
    for options, outcome in [({}, "succeeded"), ({"seed": 43}, "succeeded"), ({"reuse": False}, "succeeded"), ({}, "reused")]:
        run_id = queue.start_run(datasets=datasets, **options)
        claim = queue.claimed()
        assert (claim.run_id, queue.run(claim)) == (run_id, outcome)


def test_a_damaged_artifact_is_not_reused_but_made_again(queue: Any) -> None:
    datasets = {"books": [queue.book()], "qa": [queue.upload("{}", "qa.jsonl")]}
    first = queue.start_run(datasets=datasets)
    queue.run(queue.claimed())
    storage = LocalStorage(queue.settings.artifacts_dir)
    (storage.path(queue.jobs(first)["dapt"].artifact_id) / "adapter.txt").unlink()
    second = queue.start_run(datasets=datasets)
    claim = queue.claimed()
    assert claim.run_id == second
    assert queue.run(claim) == "succeeded"
    storage.verify(queue.jobs(first)["dapt"].artifact_id)  # equal content: healed in place


def test_a_run_does_not_take_the_model_server_from_an_alias_that_came_meanwhile(queue: Any) -> None:
    first = queue.start_run()
    second = queue.start_run(deploy="other")
    third = queue.start_run(deploy={"alias": "third", "replace": True})
    queue.work()
    assert (queue.the_run(first).state, queue.the_run(third).state) == ("succeeded", "succeeded")
    assert (queue.the_run(second).state, queue.jobs(second)["deploy"].error["code"]) == ("failed", "model_server_taken")
    with queue.sessions() as session:
        served = {alias.name: alias.model for alias in session.scalars(select(Alias))}
    assert served == {"kp": None, "third": queue.the_run(third).model}


@pytest.mark.parametrize("damage", ["manifest", "link"])
def test_rubbish_where_an_artifact_was_does_not_stop_the_worker(queue: Any, damage: str) -> None:
    datasets = {"books": [queue.book()], "qa": [queue.upload("{}", "qa.jsonl")]}
    first = queue.start_run(datasets=datasets)
    queue.run(queue.claimed())
    storage = LocalStorage(queue.settings.artifacts_dir)
    artifact = storage.path(queue.jobs(first)["dapt"].artifact_id)
    if damage == "manifest":
        (artifact / "manifest.json").write_bytes(b"\0\0\0")
    else:
        (artifact / "adapter.txt").unlink()
        (artifact / "adapter.txt").symlink_to("/etc/passwd")
    with pytest.raises(ArtifactDamaged):
        storage.verify(queue.jobs(first)["dapt"].artifact_id)
    queue.start_run(datasets=datasets)
    assert queue.run(queue.claimed()) == "succeeded"
    storage.verify(queue.jobs(first)["dapt"].artifact_id)


@pytest.mark.parametrize(("made_by", "read_by"), [("merge", "quantize"), ("quantize", "deploy")])
def test_a_flipped_byte_of_an_input_is_noticed_before_it_is_read(queue: Any, made_by: str, read_by: str) -> None:
    run_id = queue.start_run()
    for name in LINE[: LINE.index(read_by)]:
        assert queue.run(queue.claimed("train" if name in ("dapt", "sft") else name.partition("_")[0])) == "succeeded"
    storage = LocalStorage(queue.settings.artifacts_dir)
    directory = storage.path(queue.jobs(run_id)[made_by].artifact_id)
    victim = directory / {"merge": "merged.txt", "quantize": "quantized.txt"}[made_by]
    before, data = victim.stat(), bytearray(victim.read_bytes())
    data[3] ^= 1
    victim.write_bytes(data)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert queue.run(queue.claimed(read_by)) == "failed"
    error = queue.jobs(run_id)[read_by].error
    assert (error["code"], victim.name in error["message"]) == ("artifact_damaged", True)


def test_an_input_is_hashed_once_for_all_stages_that_read_it(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = manifest.sha256_file
    monkeypatch.setattr(manifest, "sha256_file", lambda path: hashed.append(path.name) or real(path))
    queue.start_run()
    queue.work()
    # once when published, once when first read: merge, quantize, evaluate and deploy read what others have read before
    assert (hashed.count("adapter.txt"), hashed.count("merged.txt"), hashed.count("quantized.txt")) == (4, 4, 2)


def test_equal_bytes_under_another_suffix_are_another_input(queue: Any) -> None:
    orders = json.dumps({"steps": 1, "seconds": 0})
    for name, outcome in (("a.txt", "succeeded"), ("a.jsonl", "succeeded"), ("b.txt", "reused")):
        datasets = {"books": [queue.upload(orders, name)], "qa": [queue.upload("{}", "qa.jsonl")]}
        run_id = queue.start_run(datasets=datasets)
        claim = queue.claimed()
        assert (claim.run_id, queue.run(claim)) == (run_id, outcome)


def test_an_evaluation_gets_that_of_the_model_which_serves_to_compare_with(queue: Any) -> None:
    first = queue.start_run()
    queue.work()
    report = queue.jobs(first)["evaluate"].artifact_id
    second = queue.start_run(seed=43)
    assert champion(queue, second) == report
    assert champion(queue, second, quantize=queue.jobs(first)["quantize"].artifact_id) is None, "the very model that serves"
    assert champion(queue, queue.start_run(deploy="other")) is None
    assert champion(queue, queue.start_run(deploy=None)) is None


def champion(queue: Any, run_id: str, **artifacts: str) -> str | None:
    with queue.sessions() as session:
        return inputs._champion(session, queue.jobs(run_id)["evaluate"], artifacts)


def test_a_champions_report_that_is_gone_is_not_compared_with(queue: Any) -> None:
    run_id = queue.start_run()
    with queue.sessions() as session:
        spec = session.get_one(Job, queue.jobs(run_id)["evaluate"].id).spec
    file_id = queue.upload("anything", "book.txt")
    swapped = {name: [{"file": file_id}] for name in spec["inputs"]}
    rows = {file_id: inputs.FileRow(file_id, "book.txt", hashlib.sha256(b"anything").hexdigest())}
    gathered = inputs.Gathered(kind="evaluate", spec={**spec, "inputs": swapped}, files=rows, champion="sha256:" + "0" * 64)
    config = inputs.resolve(gathered, queue.settings, LocalStorage(queue.settings.artifacts_dir)).config
    assert config.model_dump()["champion"] is None


def test_held_by_a_gate_succeeds_without_deploying(queue: Any) -> None:
    run_id = queue.start_run(gates=[{"metric": "exact.sft", "min": 0.9, "action": "hold"}])
    queue.work()
    run, deploy = queue.the_run(run_id), queue.jobs(run_id)["deploy"]
    assert (run.state, run.gate) == ("succeeded", "hold")
    assert (deploy.state, deploy.error["code"]) == ("cancelled", "held_by_gate")
    with queue.sessions() as session:
        assert session.get(Alias, "kp") is None
        assert session.get_one(Model, run.model)
    with pytest.raises(WrongState, match="POST /v1/deployments"), transaction(queue.sessions) as session:
        retry_job(session, deploy.id)
    with pytest.raises(WrongState, match="no failed or cancelled job"), transaction(queue.sessions) as session:
        retry_run(session, run_id)


SLOW_SERVER = {"metric": "serving.tokens_per_second", "min": 50}


def test_held_by_a_gate_on_the_live_endpoint_succeeds_without_moving_the_alias(queue: Any) -> None:
    before = queue.start_run(gates=[{"metric": "exact.sft", "min": 0.4, "action": "fail"}])
    queue.work()
    run_id = queue.start_run(gates=[{**SLOW_SERVER, "action": "hold"}])
    queue.work()
    run, deploy = queue.the_run(run_id), queue.jobs(run_id)["deploy"]
    assert (run.state, run.gate, run.error) == ("succeeded", "hold", None)
    assert (deploy.state, deploy.error["code"]) == ("cancelled", "held_by_gate")
    assert "serving.tokens_per_second = 40.0, wanted at least 50" in deploy.error["message"]
    assert deploy.result["metrics"] == {"serving.tokens_per_second": 40.0}
    with queue.sessions() as session:
        assert session.get_one(Alias, "kp").model == queue.the_run(before).model
        rows = session.execute(select(Deployment.status, Deployment.error["code"].astext).order_by(Deployment.generation)).all()
    assert [tuple(row) for row in rows] == [("ready", None), ("failed", "held_by_gate")]


def test_failed_by_a_gate_on_the_live_endpoint_fails_the_run(queue: Any) -> None:
    run_id = queue.start_run(gates=[{**SLOW_SERVER, "action": "fail"}])
    queue.work()
    run = queue.the_run(run_id)
    assert (run.state, run.gate, run.error["code"]) == ("failed", "fail", "gate_failed")
    assert "the live endpoint missed serving.tokens_per_second" in run.error["message"]
    with queue.sessions() as session:
        assert session.get_one(Alias, "kp").model is None


def test_a_gate_on_the_live_endpoint_that_only_warns_moves_the_alias(queue: Any) -> None:
    run_id = queue.start_run(gates=[{**SLOW_SERVER, "action": "promote"}])
    queue.work()
    run = queue.the_run(run_id)
    assert (run.state, run.gate) == ("succeeded", "promote")
    with queue.sessions() as session:
        assert session.get_one(Alias, "kp").model == run.model
        told = session.scalars(select(Event.message).where(Event.run_id == run_id, Event.level == "warn")).all()
    assert told == ["gate missed: serving.tokens_per_second = 40.0, wanted at least 50.0"]


@pytest.mark.parametrize("deploy", ["kp", None])
def test_failed_by_a_gate_fails_the_run(queue: Any, deploy: str | None) -> None:
    run_id = queue.start_run(gates=[{"metric": "exact.sft", "min": 0.9, "action": "fail"}], deploy=deploy)
    queue.work()
    run = queue.the_run(run_id)
    assert (run.state, run.gate, run.model) == ("failed", "fail", None)
    assert run.error["code"] == "gate_failed"
    assert "exact.sft = 0.5, wanted at least 0.9" in run.error["message"]
    with pytest.raises(WrongState, match="failed by a gate"), transaction(queue.sessions) as session:
        retry_run(session, run_id)


def test_a_missed_gate_that_only_warns_promotes(queue: Any) -> None:
    run_id = queue.start_run(gates=[{"metric": "exact.sft", "min": 0.9, "action": "promote"}])
    queue.work()
    assert (queue.the_run(run_id).state, queue.states(run_id)["deploy"]) == ("succeeded", "succeeded")


def test_a_failure_ends_the_run_and_retry_goes_on_from_there(queue: Any) -> None:
    book = queue.book(steps=6, exit="diverged", at=4)
    run_id = queue.start_run(datasets={"books": [book], "qa": [queue.upload("{}", "qa.jsonl")]})
    assert queue.work() == ["dapt:failed"]
    run, jobs = queue.the_run(run_id), queue.jobs(run_id)
    assert (run.state, run.error["code"]) == ("failed", "diverged")
    assert "lower the learning rate" in run.error["message"]
    assert {job.error["code"] for name, job in jobs.items() if name != "dapt"} == {"upstream_failed"}
    with pytest.raises(WrongState, match="needs dapt"), transaction(queue.sessions) as session:
        retry_job(session, jobs["merge_dapt"].id)
    with transaction(queue.sessions) as session:
        retry_job(session, jobs["dapt"].id)
    assert list(queue.states(run_id).values()) == ["queued"] + ["waiting"] * 6
    assert queue.the_run(run_id).state == "queued"
    queue.work()
    with queue.sessions() as session:
        attempts = session.execute(
            select(Attempt.number, Attempt.state).where(Attempt.job_id == jobs["dapt"].id).order_by(Attempt.number)
        ).all()
    assert [tuple(row) for row in attempts] == [(1, "failed"), (2, "failed")]


def test_cancelling_a_run_cancels_what_waits_and_retry_brings_it_back(queue: Any) -> None:
    run_id = queue.start_run()
    claim = queue.claimed()
    with transaction(queue.sessions) as session:
        request_cancel(session, run_id)
    assert queue.job(claim.job_id).cancel_requested
    assert set(queue.states(run_id).values()) == {"running", "cancelled"}
    assert queue.the_run(run_id).state not in ("cancelled", "succeeded", "failed")  # until the worker has really stopped
    for retry, name in ((retry_run, run_id), (retry_job, queue.jobs(run_id)["sft"].id)):
        with (
            pytest.raises(WrongState, match=r"still being cancelled .dapt is stopping.; retry once"),
            transaction(queue.sessions) as session,
        ):
            retry(session, name)
    assert queue.run(claim) == "cancelled"
    assert queue.the_run(run_id).state == "cancelled"
    assert set(queue.states(run_id).values()) == {"cancelled"}
    with pytest.raises(WrongState, match="already cancelled"), transaction(queue.sessions) as session:
        request_cancel(session, run_id)
    with transaction(queue.sessions) as session:
        retry_run(session, run_id)
    queue.work()
    assert queue.the_run(run_id).state == "succeeded"


def test_a_retried_job_starts_its_clock_anew(queue: Any) -> None:
    job_id = queue.enqueue(exit="diverged", at=1)
    queue.run(queue.claimed())
    with transaction(queue.sessions) as session:
        long_ago = func.now() - timedelta(days=3)
        session.execute(update(Job).values(started_at=long_ago, finished_at=long_ago))
    with transaction(queue.sessions) as session:
        retry_job(session, job_id)
    assert queue.job(job_id).started_at is None
    queue.run(queue.claimed())
    job = queue.job(job_id)
    assert job.finished_at - job.started_at < timedelta(hours=1)


def test_two_runs_whose_ids_begin_alike_have_two_models(queue: Any) -> None:
    datasets = {"books": [queue.book()], "qa": [queue.upload("{}", "qa.jsonl")]}
    first = queue.start_run(datasets=datasets)
    queue.work()
    taken = queue.the_run(first).model
    second = queue.start_run(datasets=datasets, seed=43)
    with transaction(queue.sessions) as session:  # as if the first run's id began with the same digits
        values = {"base_model": "tiny", "artifact_id": queue.jobs(first)["quantize"].artifact_id, "run_id": first}
        session.add(Model(id=taken.replace(first[4:12], second[4:12]), **values))
    queue.work()
    run = queue.the_run(second)
    assert run.model == taken.replace(first[4:12], second[4:16])
    with queue.sessions() as session:
        model = session.get_one(Model, run.model)
        assert (model.artifact_id, model.run_id) == (queue.jobs(second)["quantize"].artifact_id, second)
        assert session.get_one(Alias, "kp").model == run.model


def test_a_cancel_while_the_product_is_published_is_heard(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = queue.start_run()
    claim = queue.claimed()
    real = products.publish

    def publish(*arguments: Any) -> products.Product:
        product = real(*arguments)
        with transaction(queue.sessions) as session:
            request_cancel(session, run_id)
        return product

    monkeypatch.setattr(products, "publish", publish)
    assert queue.run(claim) == "cancelled"
    assert (queue.the_run(run_id).state, set(queue.states(run_id).values())) == ("cancelled", {"cancelled"})
    with queue.sessions() as session:
        assert session.scalars(select(Attempt.state)).all() == ["cancelled"]
        assert session.scalars(select(Artifact)).all() == []
    with transaction(queue.sessions) as session:
        retry_run(session, run_id)
    monkeypatch.setattr(products, "publish", real)
    queue.work()
    assert queue.the_run(run_id).state == "succeeded"


def test_a_cancel_while_an_earlier_product_is_checked_is_heard(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = {"books": [queue.book()], "qa": [queue.upload("{}", "qa.jsonl")]}
    queue.start_run(datasets=datasets)
    queue.run(queue.claimed())
    run_id = queue.start_run(datasets=datasets)
    real = LocalStorage.verify

    def verify(storage: LocalStorage, *arguments: Any, **options: Any) -> Path:
        with transaction(queue.sessions) as session:
            request_cancel(session, run_id)
        return real(storage, *arguments, **options)

    claim = queue.claimed()
    assert claim.run_id == run_id
    monkeypatch.setattr(LocalStorage, "verify", verify)
    assert queue.run(claim) == "cancelled"
    assert (queue.the_run(run_id).state, queue.jobs(run_id)["dapt"].artifact_id) == ("cancelled", None)


def test_cancelling_a_queued_job_is_immediate(queue: Any) -> None:
    job_id = queue.enqueue()
    with transaction(queue.sessions) as session:
        request_cancel(session, job_id)
    assert queue.job(job_id).state == "cancelled"
    assert queue.claim() is None


def test_an_older_deployment_never_flips_back(queue: Any) -> None:
    first = queue.start_run()
    queue.work()
    model = queue.the_run(first).model
    artifact = queue.jobs(first)["quantize"].artifact_id
    spec = deploy_spec(model=model, artifact_id=artifact, params=DeployParams(alias="kp"))
    with transaction(queue.sessions) as session:
        slow = enqueue_job(session, kind="deploy", spec=spec).id
    slow_claim = queue.claimed("deploy")
    from parampara.execution import inputs, outcomes  # the slow one: its generation is handed out, it has not finished

    with transaction(queue.sessions) as session:
        gathered = inputs.gather(session, slow_claim)
    assert gathered is not None
    assert gathered.deployment["generation"] == 2
    with transaction(queue.sessions) as session:
        enqueue_job(session, kind="deploy", spec=spec)
    assert queue.work() == ["deploy:succeeded"]
    with transaction(queue.sessions) as session:
        result = {"url": "http://old:8002", "generation": 2}
        assert outcomes.succeed(session, slow_claim, settings=queue.settings, result=result)
    with queue.sessions() as session:
        alias = session.get_one(Alias, "kp")
        assert (alias.active_generation, alias.url) == (3, "http://model:8002")
        statuses = session.execute(select(Deployment.generation, Deployment.status).order_by(Deployment.generation)).all()
    assert [tuple(row) for row in statuses] == [(1, "superseded"), (2, "superseded"), (3, "ready")]
    assert queue.job(slow).state == "succeeded"


def test_a_deployment_that_cannot_start_fails_and_leaves_the_alias(queue: Any) -> None:
    run_id = queue.start_run(deploy={"alias": "kp", "max_num_seqs": 4096})
    queue.work()
    run = queue.the_run(run_id)
    assert run.state == "failed"
    assert "refused the model" in run.error["message"]
    with queue.sessions() as session:
        assert session.get_one(Alias, "kp").model is None
        deployment = session.scalars(select(Deployment)).one()
    assert (deployment.status, deployment.error["message"]) == ("failed", "the model server refused the model")


def test_idempotency_key(queue: Any) -> None:
    datasets = {"books": [queue.book()], "qa": [queue.upload("{}", "qa.jsonl")]}
    first = queue.start_run(datasets=datasets, idempotency_key="k", request_sha256="a")
    assert queue.start_run(datasets=datasets, idempotency_key="k", request_sha256="a") == first
    with pytest.raises(InvalidRequest, match="another request"):
        queue.start_run(datasets=datasets, idempotency_key="k", request_sha256="b")
    with queue.sessions() as session:
        assert len(session.scalars(select(Job)).all()) == 7


def test_bad_datasets_leave_nothing_behind(queue: Any) -> None:
    book, qa = queue.book(), queue.upload("{}", "qa.jsonl")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"books": [book]}, "datasets.qa"),
        ({"books": [book], "qa": [qa], "extra": []}, "datasets.extra"),
        ({"books": [book], "qa": [book]}, "datasets.qa"),
        ({"books": book, "qa": [qa]}, "datasets.books"),
        ({"books": [book], "qa": ["file-" + "0" * 24]}, "datasets.qa"),
        ({"books": [book], "qa": [qa], "preferences": [queue.upload("{}", "pairs.jsonl")]}, "datasets.preferences"),
    ]
    for datasets, param in bad:
        with pytest.raises((InvalidRequest, NotFound)) as caught:
            queue.start_run(datasets=datasets)
        assert caught.value.param == param
    with queue.sessions() as session:
        assert session.scalars(select(Job)).all() == []


def test_a_file_that_changed_after_upload_fails_the_job(queue: Any) -> None:
    run_id = queue.start_run()
    for path in queue.settings.files_dir.glob("*.txt"):
        path.write_text('{"steps": 1, "seconds": 0}')
    queue.work()
    error = queue.the_run(run_id).error
    assert (error["code"], "differs from what was uploaded" in error["message"]) == ("invalid_data", True)


def test_equal_artifacts_are_stored_once(queue: Any) -> None:
    for _ in range(2):
        queue.enqueue(steps=2)
    queue.work()
    with queue.sessions() as session:
        (artifact,) = session.scalars(select(Artifact)).all()
        assert set(session.scalars(select(Job.artifact_id))) == {artifact.id}
