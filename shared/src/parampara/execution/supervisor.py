"""Runs one attempt of a claimed job: resolves its inputs, supervises the stage process, publishes what it made.

The thread that calls :meth:`Supervisor.run` starts the process and waits for it; the lease is renewed by another thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from parampara.db.session import is_away, transaction
from parampara.db.storable import storable
from parampara.errors import ArtifactDamaged, NotFound, ParamparaError
from parampara.execution import inputs, leases, metrics, outcomes, products
from parampara.execution.exits import Ending, read_ending
from parampara.execution.lease_keeper import LeaseKeeper
from parampara.execution.leases import Claim
from parampara.execution.preloaded import Preloaded
from parampara.execution.process import SpawnedStage, StageProcess
from parampara.execution.watch import ProgressBook, ProgressTail
from parampara.settings import Settings
from parampara.storage import LocalStorage, write_atomically
from parampara.telemetry import bind, get_logger

_TICK_SECONDS = 0.1
_FLUSH_SECONDS = 1.0
_AGAIN_SECONDS = 1.0
_BUSY_SECONDS = 15.0
"""Until a job is tried again whose directory another process holds, e.g. the stage of a worker that is cut off."""
_log = get_logger(__name__)

T = TypeVar("T")


class Supervisor:
    """``stopping`` is set when the worker is to end: the stage gets its grace to checkpoint and the job goes back.

    With ``preloaded``, stages are forked from that process where it can serve them.
    """

    def __init__(
        self,
        settings: Settings,
        sessions: sessionmaker[Session],
        *,
        service: str,
        stopping: threading.Event,
        preloaded: Preloaded | None = None,
    ) -> None:
        self._settings, self._sessions = settings, sessions
        self._service, self._stopping, self._preloaded = service, stopping, preloaded
        self._storage = LocalStorage(settings.artifacts_dir)

    def run(self, claim: Claim) -> str:
        """Work on a claim until it has an end; returns which: ``succeeded reused held failed crashed preempted cancelled stale``."""
        started = time.monotonic()
        with bind(run_id=claim.run_id, job_id=claim.job_id, attempt=claim.attempt), metrics.RUNNING.labels(claim.kind).track_inprogress():
            _log.info("attempt started", job=claim.name, kind=claim.kind, fence=claim.fence)
            with LeaseKeeper(self._sessions, claim, self._settings.worker) as lease:
                outcome = self._contained(claim, lease)
            seconds = time.monotonic() - started
            metrics.JOBS.labels(claim.kind, outcome).inc()
            metrics.ATTEMPT_SECONDS.labels(claim.kind).observe(seconds)
            _log.info("attempt ended", job=claim.name, kind=claim.kind, outcome=outcome, seconds=round(seconds, 2))
        return outcome

    def _contained(self, claim: Claim, lease: LeaseKeeper) -> str:
        """The boundary: what nobody expected costs the attempt, never the worker."""
        try:
            return self._attempt(claim, lease)
        except Exception as error:  # noqa: BLE001
            if is_away(error):
                return "stale" if lease.lost.is_set() else self._release(claim)
            _log.exception("unexpected error in the supervisor")
            if isinstance(error, DataError | IntegrityError):  # it would be refused again
                refused = {"code": "bad_result", "message": storable(f"the database refused what was to be written: {error.orig}")}
                return self._write(lambda session: outcomes.fail(session, claim, error=refused))
            message = storable(f"the supervisor failed: {type(error).__name__}: {error}")
            return self._crash(claim, {"code": "internal_error", "message": message})

    def _attempt(self, claim: Claim, lease: LeaseKeeper) -> str:
        try:
            prepared = self._prepare(claim, lease)
            if not isinstance(prepared, inputs.Resolved):
                return prepared
            workdir = workdir_of(self._settings, claim.job_id)
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / "error.json").unlink(missing_ok=True)  # of an earlier attempt: not to be taken for this one's
            write_atomically(workdir / "config.json", prepared.config.model_dump_json(indent=1).encode())
            ending = self._supervise(claim, lease, workdir, prepared.secrets)
        except ParamparaError as error:
            _log.warning("inputs are not usable", error=error.message)
            body = error.body()["error"]
            return self._write(lambda session: outcomes.fail(session, claim, error=body))
        except OSError as error:
            return self._crash(claim, products.disk_error(error, f"cannot prepare the attempt under {self._settings.work_dir}"))
        return self._end(claim, lease, prepared, workdir, ending)

    def _prepare(self, claim: Claim, lease: LeaseKeeper) -> inputs.Resolved | str:
        """The stage's configuration, or how the attempt has ended already."""
        gathered = self._ask(lease, lambda session: inputs.gather(session, claim))
        if gathered is None:
            return "stale"
        resolved = inputs.resolve(gathered, self._settings, self._storage)
        if (key := resolved.cache_key) is None:
            return resolved
        twin = self._ask(lease, lambda session: inputs.find_twin(session, claim, key))
        if twin is None:
            return resolved
        try:
            self._storage.verify(str(twin.artifact_id))
        except (NotFound, ArtifactDamaged, OSError) as error:
            _log.warning("an equal job's artifact is not usable; running the stage", twin=twin.id, error=str(error))
            return resolved
        return self._write(lambda session: outcomes.reuse(session, claim, settings=self._settings, source=twin))

    def _ask(self, lease: LeaseKeeper, read: Callable[[Session], T]) -> T:
        """What ``read`` finds in one transaction; asked again while the database is away and the lease may still hold.

        Raises:
            SQLAlchemyError: the database stayed away for the whole lease, or until the worker was told to stop.
        """
        while True:
            try:
                with transaction(self._sessions) as session:
                    return read(session)
            except SQLAlchemyError as error:
                if not is_away(error) or lease.gone:
                    raise
                _log.warning("the database is away; the attempt waits", error=str(error).splitlines()[0])
                if self._stopping.wait(_AGAIN_SECONDS):
                    raise

    def _supervise(self, claim: Claim, lease: LeaseKeeper, workdir: Path, secrets: Mapping[str, str]) -> Ending:
        """Start the stage and stay with it until it is dead; ends it when the lease, a user, the worker or a stall says so."""
        tail, book = ProgressTail(workdir / "progress.jsonl"), ProgressBook(claim.progress)
        process = self._start(claim, workdir, secrets)
        lease.on_gone = process.kill
        if lease.gone:  # between the claim and the line above
            process.kill()
        reason, kill_at = None, float("inf")
        sign_of_life = flushed = time.monotonic()
        try:
            while (code := process.wait(_TICK_SECONDS)) is None:
                now = time.monotonic()
                if self._follow(claim, tail, book):
                    sign_of_life = now
                if now - flushed >= _FLUSH_SECONDS:
                    self._flush(claim, lease, book)
                    flushed = now
                if reason is None and (reason := self._reason_to_stop(lease, now - sign_of_life)):
                    _log.info("stopping the stage", reason=reason)
                    if reason == "stalled":
                        process.dump_stacks()
                    process.ask_to_stop()
                    kill_at = now + self._settings.worker.stop_grace_seconds
                if now > kill_at:
                    process.kill()
        finally:
            lease.on_gone = lambda: None
            process.kill()  # whatever it started and left behind
        self._follow(claim, tail, book)
        self._flush(claim, lease, book)
        return read_ending(workdir, code, stopped_because=reason, log_tail=process.log_tail(), kind=claim.kind)

    def _start(self, claim: Claim, workdir: Path, secrets: Mapping[str, str]) -> StageProcess:
        log = workdir / f"attempt-{claim.attempt}.log"
        if self._preloaded is not None and not secrets:  # a preloaded process has been given none
            self._preloaded.start()
            if stage := self._preloaded.launch(kind=claim.kind, config=workdir / "config.json", workdir=workdir, log=log):
                return stage
        return SpawnedStage(service=self._service, kind=claim.kind, workdir=workdir, log=log, secrets=secrets)

    def _follow(self, claim: Claim, tail: ProgressTail, book: ProgressBook) -> bool:
        """Take in new lines of progress; True when there were any."""
        lines = list(tail.read())
        for line in lines:
            book.fold(line)
        if lines and "step" in book.progress:
            metrics.STEP.labels(claim.kind).set(book.progress["step"])
            if (loss := book.progress["metrics"].get("loss")) is not None:
                metrics.LOSS.labels(claim.kind).set(loss)
        return bool(lines)

    def _flush(self, claim: Claim, lease: LeaseKeeper, book: ProgressBook) -> None:
        try:
            with transaction(self._sessions) as session:
                if book.changed:
                    beat = leases.record(session, claim, progress=book.progress, events=book.pending())
                else:
                    beat = leases.check(session, claim)
        except DataError as error:  # it will never be taken; the file still has it
            _log.warning("progress dropped: the database does not take it", error=str(error).splitlines()[0])
            book.written()
            return
        except SQLAlchemyError as error:
            _log.warning("progress not written yet", error=str(error).splitlines()[0])
            return
        book.written()
        lease.note(beat)

    def _reason_to_stop(self, lease: LeaseKeeper, silent_seconds: float) -> str | None:
        if lease.cancel_requested.is_set():
            return "cancelled"
        if self._stopping.is_set():
            return "worker stopping"
        return "stalled" if silent_seconds > self._settings.worker.stall_seconds else None

    def _end(self, claim: Claim, lease: LeaseKeeper, resolved: inputs.Resolved, workdir: Path, ending: Ending) -> str:
        """Write how the attempt ended; where the lease is gone for good, nothing."""
        if lease.lost.is_set():
            return "stale"
        told: dict[str, Any] = {"exit_code": ending.exit_code, "log_tail": ending.log_tail}
        match ending.outcome:
            case "succeeded" if not lease.cancel_requested.is_set():
                return self._publish(claim, resolved, workdir, ending)
            case "cancelled" | "succeeded":
                return self._write(lambda session: outcomes.cancel(session, claim, **told))
            case "failed":
                return self._write(lambda session: outcomes.fail(session, claim, error=ending.error, **told))
            case "preempted" | "busy":
                told |= {"reason": ending.error["message"], "wait_seconds": _BUSY_SECONDS if ending.outcome == "busy" else 0}
                return self._write(lambda session: outcomes.release(session, claim, **told))
        if lease.outdated.is_set():
            return self._release(claim, **told)
        return self._crash(claim, ending.error, **told)

    def _publish(self, claim: Claim, resolved: inputs.Resolved, workdir: Path, ending: Ending) -> str:
        def fail(error: dict[str, Any]) -> str:
            return self._write(lambda session: outcomes.fail(session, claim, error=error, exit_code=0, log_tail=ending.log_tail))

        try:
            product = products.publish(self._storage, claim.kind, resolved, workdir, ending.result)
            outcome = self._write(lambda session: self._succeed(session, claim, product, ending))
        except ParamparaError as error:
            return fail(error.body()["error"])
        except OSError as error:
            return fail(products.disk_error(error, f"the stage succeeded but its product could not be stored under {self._storage.root}"))
        if outcome in ("succeeded", "held"):
            products.clean(workdir)
        return outcome

    def _succeed(self, session: Session, claim: Claim, product: products.Product, ending: Ending) -> str | None:
        told = {"result": product.result, "manifest": product.manifest, "output": product.output, "log_tail": ending.log_tail}
        return outcomes.succeed(session, claim, settings=self._settings, **told)

    def _release(self, claim: Claim, **told: Any) -> str:
        reason = "the database was away for longer than the lease"
        return self._write(lambda session: outcomes.release(session, claim, reason=reason, **told))

    def _crash(self, claim: Claim, error: dict[str, Any], **told: Any) -> str:
        _log.warning("stage crashed", error=error["message"], exit_code=told.get("exit_code"))
        limit = self._settings.worker.max_crashes
        return self._write(lambda session: outcomes.crash(session, claim, error=error, max_crashes=limit, **told))

    def _write(self, write: Callable[[Session], str | None]) -> str:
        """Write an end in one transaction, for as long as the database is away; it is guarded, so late is never wrong.

        Raises:
            SQLAlchemyError: the database is there and refuses what was to be written.
        """
        while True:
            try:
                with transaction(self._sessions) as session:
                    return write(session) or "stale"
            except SQLAlchemyError as error:
                if not is_away(error):
                    raise
                _log.warning("the end of the attempt is not written yet", error=str(error).splitlines()[0])
                if self._stopping.wait(_AGAIN_SECONDS):
                    return "stale"  # the lease runs out and another worker goes on from the checkpoint


def workdir_of(settings: Settings, job_id: str) -> Path:
    """A job's private directory; holds ``progress.jsonl`` with every step, the logs of its attempts, and checkpoints."""
    return settings.work_dir / job_id
