"""What a recipe and a worker's settings say about a training job arrives in its configuration, and what counts as the same job."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from parampara import files
from parampara.execution.inputs import FileRow, Gathered, Resolved, _Input, _merge, resolve
from parampara.plan import plan_run
from parampara.schemas.recipe import parse_recipe
from parampara.schemas.stages import DaptConfig, DpoConfig, EvaluateConfig, MergeConfig
from parampara.settings import Settings
from parampara.storage import LocalStorage
from tests.tiny_models import make_model

BOOK_ID = "file-" + "0" * 24
BOOK = b"The lord of house 2 is Venus.\n"
PAIRS_ID = "file-" + "1" * 24
PAIRS = b'{"question": "Who rules house 2?", "chosen": "Venus", "rejected": "Mars"}\n'


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
    assert (plain.tracking.report_to, plain.machine.price_per_hour, plain.machine.processes) == ([], None, 1)
    assert key == same  # neither is any part of what is trained


def test_another_method_is_another_job(base: Path, tmp_path: Path) -> None:
    _, plain = resolved(base, tmp_path, worker={})
    config, dora = resolved(base, tmp_path, worker={}, stages={"dapt": {"lora": {"use_dora": True}, "train": {"load_in_4bit": True}}})
    assert config.params.lora is not None and config.params.lora.use_dora
    assert config.params.train.load_in_4bit
    assert dora != plain


class Line:
    """The jobs of a run with DPO, resolved as if every job before them had succeeded with the same artifact."""

    def __init__(self, base: Path, home: Path) -> None:
        self.settings = Settings(home=home, base_models={"tiny": str(base)})  # type: ignore[arg-type]
        self.files = {BOOK_ID: self._file(BOOK_ID, "book.txt", BOOK), PAIRS_ID: self._file(PAIRS_ID, "pairs.jsonl", PAIRS)}
        self.storage = LocalStorage(self.settings.artifacts_dir)
        product = home / "product"
        product.mkdir()
        (product / "adapter.txt").write_text("an adapter")
        self.artifact = self.storage.publish(product, kind="adapter", config={}, versions={}).id

    def _file(self, file_id: str, name: str, content: bytes) -> FileRow:
        path = files.path_of(self.settings, file_id, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return FileRow(file_id, name, hashlib.sha256(content).hexdigest())

    def resolve(self, name: str, **dpo: Any) -> Resolved:
        datasets = {"books": [BOOK_ID], "books_validation": [], "qa": [BOOK_ID], "qa_validation": [], "preferences": [PAIRS_ID]}
        made = parse_recipe({"name": "r", "base_model": "tiny", "stages": {"dpo": dpo, "sft": {"system_prompt": "Cite."}}})
        job = next(job for job in plan_run(made, datasets) if job.name == name)
        before: dict[str, str] = dict.fromkeys("dapt merge_dapt sft merge_sft dpo merge quantize".split(), self.artifact)
        results = {"sft": {"dtype": "bfloat16"}, "dapt": {"dtype": "float32"}}
        gathered = Gathered(kind=job.kind, spec=job.spec(reuse=True), artifacts=before, results=results, files=self.files)
        return resolve(gathered, self.settings, self.storage)


@pytest.fixture
def line(base: Path, tmp_path: Path) -> Line:
    return Line(base, tmp_path)


def test_dpo_gets_its_pairs_its_model_and_the_system_prompt_of_sft(line: Line) -> None:
    found = line.resolve("dpo", beta=0.3)
    assert isinstance(found.config, DpoConfig)
    assert [path.name for path in found.config.data.train] == [f"{PAIRS_ID}.jsonl"]
    assert found.config.model == line.storage.path(line.artifact)
    assert (found.config.params.beta, found.config.params.system_prompt) == (0.3, "Cite.")
    assert found.cache_key is not None and found.cache_key != line.resolve("dpo").cache_key


def test_the_merge_that_dpo_starts_on_is_in_the_precision_of_sft(line: Line) -> None:
    merged, final = line.resolve("merge_sft").config, line.resolve("merge").config
    assert isinstance(merged, MergeConfig) and isinstance(final, MergeConfig)
    assert (merged.params.dtype, len(merged.adapters)) == ("bfloat16", 2)
    assert (final.params.dtype, len(final.adapters)) == ("float16", 3)


def test_the_evaluation_knows_the_line_with_dpo_and_what_it_was_trained_on(line: Line) -> None:
    found = line.resolve("evaluate", beta=0.3)
    assert isinstance(found.config, EvaluateConfig)
    assert found.config.sft_merged == found.config.dpo_adapter == line.storage.path(line.artifact)
    assert found.config.preferences is not None
    assert [path.name for path in found.config.preferences.train] == [f"{PAIRS_ID}.jsonl"]
    assert found.config.dpo_params.beta == 0.3
    assert found.cache_key != line.resolve("evaluate").cache_key, "which pairs are held out is part of what is measured"


def test_full_fine_tuning_is_another_job(base: Path, tmp_path: Path) -> None:
    _, plain = resolved(base, tmp_path, worker={})
    config, whole = resolved(base, tmp_path, worker={}, stages={"dapt": {"lora": None}})
    assert config.params.lora is None
    assert whole != plain


@pytest.mark.parametrize(
    ("trained", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "trained_in": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16", "trained_in": "nf4"}, "float16"),
        ({"dtype": "bfloat16", "trained_in": "float32"}, "float32"),
    ],
)
def test_the_model_between_the_stages_rounds_nothing_that_was_trained(trained: dict[str, Any], dtype: str) -> None:
    """An adapter's base has the format that was computed in; weights that were trained themselves are float32."""
    gathered = Gathered("merge", {"params": {"dtype": "float16"}, "dtype_of": "dapt"}, results={"dapt": trained})
    made = _merge(gathered, {"model": [_Input(Path("m"), "m")], "adapters": [_Input(Path("a"), "a")]}, Settings())
    assert made["params"] == {"dtype": dtype}
