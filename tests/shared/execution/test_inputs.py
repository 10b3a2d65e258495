"""What a recipe and a worker's settings say about a training job arrives in its configuration, and what counts as the same job."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from parampara import files
from parampara.execution.inputs import FileRow, Gathered, resolve
from parampara.plan import plan_run
from parampara.schemas.recipe import parse_recipe
from parampara.schemas.stages import DaptConfig
from parampara.settings import Settings
from parampara.storage import LocalStorage
from tests.tiny_models import make_model

BOOK_ID = "file-" + "0" * 24
BOOK = b"The lord of house 2 is Venus.\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("inputs") / "base")


def resolved(base: Path, home: Path, *, worker: dict[str, Any], **recipe: Any) -> tuple[DaptConfig, str | None]:
    settings = Settings(home=home, base_models={"tiny": str(base)}, worker=worker)  # type: ignore[arg-type]
    book = files.path_of(settings, BOOK_ID, "book.txt")
    book.parent.mkdir(parents=True, exist_ok=True)
    book.write_bytes(BOOK)
    datasets = {"books": [BOOK_ID], "books_validation": [], "qa": [], "qa_validation": []}
    dapt = plan_run(parse_recipe({"name": "r", "base_model": "tiny", **recipe}), datasets)[0]
    row = FileRow(BOOK_ID, "book.txt", hashlib.sha256(BOOK).hexdigest())
    gathered = Gathered(kind=dapt.kind, spec=dapt.spec(reuse=True), files={BOOK_ID: row})
    found = resolve(gathered, settings, LocalStorage(settings.artifacts_dir))
    assert isinstance(found.config, DaptConfig)
    return found.config, found.cache_key


def test_trackers_come_from_the_recipe_and_the_machine_from_the_worker(base: Path, tmp_path: Path) -> None:
    tracking = {"report_to": ["tensorboard", "wandb"], "project": "kp"}
    config, key = resolved(base, tmp_path, worker={"price_per_hour": 0.89, "peak_flops": 3.64e14, "processes": 2}, tracking=tracking)
    assert config.tracking.model_dump() == tracking
    assert config.tracking_directory == tmp_path / "tracking"
    assert (config.machine.price_per_hour, config.machine.peak_flops, config.machine.processes) == (0.89, 3.64e14, 2)
    plain, same = resolved(base, tmp_path, worker={})
    assert (plain.tracking.report_to, plain.machine.price_per_hour, plain.machine.processes) == ([], None, None)
    assert key == same  # neither is any part of what is trained


def test_another_method_is_another_job(base: Path, tmp_path: Path) -> None:
    _, plain = resolved(base, tmp_path, worker={})
    config, dora = resolved(base, tmp_path, worker={}, stages={"dapt": {"lora": {"use_dora": True}, "train": {"load_in_4bit": True}}})
    assert config.params.lora.use_dora
    assert config.params.train.load_in_4bit
    assert dora != plain
