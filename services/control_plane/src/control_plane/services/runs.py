"""Runs: created whole in one transaction after everything that can be checked was checked, then only read and steered."""

from __future__ import annotations

import hashlib
import json
import re

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from control_plane.services import recipes, run_views
from control_plane.services.paging import page
from parampara import base_models, judges
from parampara.datasets import validate_books, validate_preferences, validate_qa
from parampara.db.models import File, Run
from parampara.db.session import transaction
from parampara.errors import InvalidData, InvalidRequest, NotFound
from parampara.execution.hooks import refuse_displacing
from parampara.execution.queue import create_run
from parampara.files import get_files, path_of
from parampara.plan import DATASETS, check_datasets
from parampara.schemas.api import Order, Page, RunCreate, RunObject, RunSummary, State
from parampara.settings import Settings

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_VALIDATORS = {"books": validate_books, "qa": validate_qa, "preferences": validate_preferences}


def create(sessions: sessionmaker[Session], settings: Settings, request: RunCreate, *, idempotency_key: str | None) -> RunObject:
    """Check a request and write its run. The answer exists only once run, jobs and doorbells are committed.

    The data sets are read between two transactions, never inside one.

    Raises:
        InvalidRequest: bad recipe, unknown base model, bad data, or the idempotency key belongs to another request.
        NotFound: a file that is not there; ``param`` names the field.
        WrongState: its deployment would end the service of another alias, and the recipe does not say ``replace``.
    """
    digest = _digest(request)
    if idempotency_key is not None:
        if not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
            raise InvalidRequest("Idempotency-Key is 1 to 255 printable ASCII characters without spaces.", param="Idempotency-Key")
        if (earlier := _earlier(sessions, idempotency_key, digest)) is not None:
            return earlier
    recipe = recipes.from_request(request)
    base_models.resolve(settings, recipe.base_model)
    judges.endpoint(settings, recipe.stages.evaluate)
    datasets = check_datasets(request.datasets.model_dump(), recipe)
    if (deploy := recipe.stages.deploy) is not None:
        with transaction(sessions) as session:
            refuse_displacing(session, deploy.alias, model=None, replace=deploy.replace)  # now, not after hours of training
    check_contents(settings, _rows(sessions, datasets))
    with transaction(sessions) as session:
        run = create_run(
            session,
            settings=settings,
            recipe=recipe,
            datasets=datasets,
            name=request.name,
            extra=request.metadata,
            idempotency_key=idempotency_key,
            request_sha256=digest,
            reuse=request.reuse,
        )
        session.flush()
        session.refresh(run)
        return run_views.detail(session, run)


def check_contents(settings: Settings, rows: dict[str, list[File]]) -> None:
    """Read every data set as the stages will.

    Raises:
        InvalidData: names the field, the file, the row and the rule.
        NotFound: the bytes of a file are not on this server.
    """
    for role, files in rows.items():
        paths = [path_of(settings, file.id, file.filename) for file in files]
        for file, path in zip(files, paths, strict=True):
            if not path.is_file():
                raise NotFound(
                    f"The bytes of file {file.id!r} are gone from this server's disk; upload it again.", param=f"datasets.{role}"
                )
        labels = [file.filename for file in files]
        try:
            if role == "preferences":
                validate_preferences(paths, labels, split="preferences_validation" not in rows)
            else:
                _VALIDATORS[role.removesuffix("_validation")](paths, labels)
        except InvalidData as error:
            raise InvalidData(f"datasets.{role}: {error.message}", param=f"datasets.{role}", code=error.code) from None


def list_runs(session: Session, *, state: State | None, after: str | None, limit: int, order: Order) -> Page[RunSummary]:
    query = select(Run) if state is None else select(Run).where(Run.state == state)
    return page(session, query, key=Run.id, created=Run.created_at, after=after, limit=limit, order=order, show=run_views.summary)


def get(session: Session, run_id: str) -> RunObject:
    return run_views.detail(session, get_row(session, run_id))


def get_row(session: Session, run_id: str) -> Run:
    run = session.get(Run, run_id, populate_existing=True)
    if run is None:
        raise NotFound(f"No run {run_id!r}.", param="run_id")
    return run


def _rows(sessions: sessionmaker[Session], datasets: dict[str, list[str]]) -> dict[str, list[File]]:
    with transaction(sessions) as session:
        return {role: get_files(session, datasets[role], param=f"datasets.{role}") for role in DATASETS if datasets[role]}


def _earlier(sessions: sessionmaker[Session], idempotency_key: str, digest: str) -> RunObject | None:
    """The run that this very request made before, even when its files are gone by now."""
    with transaction(sessions) as session:
        run = session.scalars(select(Run).where(Run.idempotency_key == idempotency_key, Run.request_sha256 == digest)).one_or_none()
        return None if run is None else run_views.detail(session, run)


def _digest(request: RunCreate) -> str:
    body = request.model_dump(mode="json", exclude_unset=True)
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
