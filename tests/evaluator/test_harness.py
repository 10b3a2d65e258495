"""lm-evaluation-harness: a local task on a tiny model by the real library, and what is said where it or a task is not here."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from evaluator import harness
from evaluator.evaluate import run
from evaluator.meter import Meter
from parampara.errors import InvalidRequest, Preempted
from parampara.execution import library_process, stop
from parampara.progress import SilentProgress
from parampara.schemas.metrics import is_reported
from parampara.schemas.stages import EvaluateConfig, EvaluateParams, Gate, HarnessParams
from tests.evaluator.lines import Line

PYTHON = Path(os.environ.get("LMEVAL_PYTHON") or Path(__file__).parents[2] / ".venv-lmeval" / "bin" / "python")
needs_lmeval = pytest.mark.skipif(not PYTHON.is_file(), reason="no lm-evaluation-harness here: python3 scripts/setup.py --only lmeval")
STARS = """\
task: stars
dataset_path: json
dataset_kwargs: {data_files: {test: stars.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 3}
"""
CITES = """\
task: cites-Rule
dataset_path: json
dataset_kwargs: {data_files: {test: stars.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
filter_list: [{name: first-word, filter: [{function: regex, regex_pattern: '(\\w+)'}, {function: take_first}]}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks whose data lie beside them."""
    directory = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"Who rules star {number}?", "choices": ["Ketu", "Venus", "Sun"], "label": number % 3} for number in range(6)]
    (directory / "stars.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "stars.yaml").write_text(STARS)
    (directory / "cites.yaml").write_text(CITES)
    return directory


@pytest.fixture
def _lmeval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMEVAL_PYTHON", str(PYTHON))


def asking(line: Line, tasks: Path | None, params: HarnessParams, **changes: Any) -> EvaluateConfig:
    small = EvaluateParams(max_new_tokens=6, max_questions=4, max_chunks=2, parity_prompts=2, harness=params)
    return line.config(params=small, harness_tasks=tasks, **changes)


@needs_lmeval
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("_lmeval")
def test_a_local_task_is_measured_on_the_quantized_model_and_may_hold_it(line: Line, tasks: Path, tmp_path: Path) -> None:
    params = HarnessParams(tasks=["stars", "cites-Rule"], limit=4, num_fewshot=0, apply_chat_template=True)
    gates = [Gate(metric="harness.stars.acc", min=1.1, action="hold")]
    result = run(asking(line, tasks, params, gates=gates), workdir=tmp_path, progress=SilentProgress())
    told = {name: value for name, value in result.metrics.items() if name.startswith("harness.")}
    assert {"harness.stars.acc", "harness.stars.acc_stderr", "harness.cites_rule.exact_match_first_word"} <= set(told)
    assert 0 <= told["harness.stars.acc"] <= 1
    assert all(is_reported(name) for name in told)
    assert (result.gates[0].value, result.decision) == (told["harness.stars.acc"], "hold")
    found = json.loads((result.output / "harness.json").read_text())
    assert found["n-samples"]["stars"] == {"original": 6, "effective": 4}
    assert (found["versions"]["stars"], found["n-shot"]["stars"]) == (3, 0)
    assert found["results"]["stars"]["acc,none"] == told["harness.stars.acc"]
    page = (result.output / "report.html").read_text()
    assert "<code>cites_rule</code>" in page and "exact match first word" in page
    for name in ("harness.json", "report.html", "report.json"):
        assert str(tmp_path) not in (result.output / name).read_text() and str(line.root) not in (result.output / name).read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"output"}


@needs_lmeval
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("_lmeval")
def test_a_task_that_is_nowhere_is_told_before_any_model_is_loaded(line: Line, tasks: Path, tmp_path: Path) -> None:
    config = asking(line, tasks, HarnessParams(tasks=["stars", "no_such_task"]))
    with pytest.raises(
        InvalidRequest, match=r"cannot be loaded.*no_such_task: neither in .* nor among the tasks of lm-evaluation-harness"
    ) as caught:
        run(config, workdir=tmp_path, progress=SilentProgress())
    assert (caught.value.code, caught.value.param) == ("harness_failed", "params.harness")
    (tasks / "lost.yaml").write_text(STARS.replace("task: stars", "task: lost").replace("stars.jsonl", "lost.jsonl"))
    with pytest.raises(InvalidRequest, match=r"lost\.jsonl"):
        run(asking(line, tasks, HarnessParams(tasks=["lost"])), workdir=tmp_path, progress=SilentProgress())


def test_without_the_library_the_command_is_told_before_any_model_is_loaded(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMEVAL_PYTHON", str(tmp_path / "python"))
    with pytest.raises(InvalidRequest, match=r"python3 scripts/setup.py --only lmeval") as caught:
        run(asking(line, None, HarnessParams(tasks=["stars"]), merged=line.root / "merged"), workdir=tmp_path, progress=SilentProgress())
    assert caught.value.code == "harness_not_installed"


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the library's Python one that first runs what the test has written."""
    script, python = tmp_path / "pretend.py", tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$3"\n')
    python.chmod(0o755)
    monkeypatch.setenv("LMEVAL_PYTHON", str(python))
    return script


def evaluate(line: Line, tmp_path: Path) -> dict[str, Any]:
    config = asking(line, None, HarnessParams(tasks=["stars"], limit=3))
    return harness.evaluate(config, scratch=tmp_path / "scratch", meter=Meter(SilentProgress(), total=1))


def test_the_library_gets_no_secret_and_no_network(line: Line, tmp_path: Path, pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PARAMPARA_EVALUATOR__JUDGE_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "s3cret")
    pretended.write_text(
        "import json, os, sys\nrequest = json.load(open(sys.argv[1]))\n"
        "json.dump({'request': request, 'environment': dict(os.environ)}, open(request['output'], 'w'))\n"
    )
    found = evaluate(line, tmp_path)
    assert "s3cret" not in json.dumps(found)
    assert found["environment"]["HF_DATASETS_OFFLINE"] == found["environment"]["HF_HUB_OFFLINE"] == "1"
    assert (found["request"]["model"], found["request"]["dtype"], found["request"]["limit"]) == (str(line.root / "quantized"), "auto", 3)
    assert not (tmp_path / "scratch").exists()


def test_a_failure_is_told_with_its_last_words(line: Line, tmp_path: Path, pretended: Path) -> None:
    lines = ["import json, sys", "request = json.load(open(sys.argv[1]))", "json.dump({}, open(request['output'], 'w'))"]
    pretended.write_text("\n".join([*lines, "sys.exit('CUDA error: out of luck' if request['model'] else 0)"]))
    with pytest.raises(harness.HarnessFailed, match=r"ended with status 1: CUDA error: out of luck") as caught:
        evaluate(line, tmp_path)
    assert caught.value.code == "harness_failed"


@pytest.mark.parametrize("deaf", [False, True])
def test_a_wish_to_stop_ends_the_library(line: Line, tmp_path: Path, pretended: Path, monkeypatch: pytest.MonkeyPatch, deaf: bool) -> None:
    """Also one that does not hear SIGTERM."""
    monkeypatch.setattr(library_process, "STOP_SECONDS", 1.0)
    told = tmp_path / "pid"
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if deaf else ""
    pretended.write_text(
        f"import os, pathlib, signal, time\n{ignore}path = pathlib.Path({str(told)!r})\n"
        "path.with_suffix('.new').write_text(str(os.getpid()))\npath.with_suffix('.new').rename(path)\ntime.sleep(60)\n"
    )

    def stop_when_it_runs() -> None:
        while not told.exists():
            time.sleep(0.05)
        stop.request()

    threading.Thread(target=stop_when_it_runs, daemon=True).start()
    try:
        with pytest.raises(Preempted):
            evaluate(line, tmp_path)
    finally:
        stop.clear()
    assert not Path(f"/proc/{told.read_text()}").exists()
    assert not (tmp_path / "scratch").exists()


def test_the_librarys_figures_become_metrics() -> None:
    params = HarnessParams(tasks=["MMLU-pro", "gsm8k"])
    found = {
        "results": {
            "MMLU-pro": {"alias": "MMLU-pro", "acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 4},
            "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.5, "exact_match,flexible-extract": 1},
            "mmlu_part": {"acc,none": 0.1},
        }
    }
    assert harness.metrics(found, params) == {
        "harness.mmlu_pro.acc": 0.5,
        "harness.gsm8k.exact_match_strict_match": 0.25,
        "harness.gsm8k.exact_match_strict_match_stderr": 0.5,
        "harness.gsm8k.exact_match_flexible_extract": 1.0,
    }
    assert harness.metrics({}, None) == {}
