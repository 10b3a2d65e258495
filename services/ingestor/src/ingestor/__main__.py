"""``python -m ingestor ingest --config FILE --workdir DIR`` runs the stage; ``python -m ingestor worker`` takes jobs."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel

from parampara.execution.child import Stage, main
from parampara.schemas.ingest import IngestConfig


def _ingest() -> Callable[..., BaseModel | None]:
    from ingestor.ingest import run

    return run


if __name__ == "__main__":
    main("ingestor", stages={"ingest": Stage(IngestConfig, _ingest)}, queue="ingest")
