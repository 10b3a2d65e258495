"""The whole line with everything real: Postgres, Redis, Celery workers, training, bitsandbytes, vLLM, gateway and the `openai` SDK.

It is the demo itself with a recipe of few steps: little is learnt, everything is made, measured, served and asked. SFT takes as many
steps as a model needs that never ends its answer before the first word: after a dozen it still may.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
QUICK = {"dapt": {"epochs": 1, "max_steps": 8}, "sft": {"epochs": 1, "max_steps": 250}}
GATES = [
    {"metric": "parity.dapt.top1", "min": 0.99, "action": "fail"},
    {"metric": "parity.merged.top1", "min": 0.99, "action": "fail"},
    {"metric": "parity.merged.differs_from_base", "min": 1, "action": "fail"},
    {"metric": "parity.quantized.chat_template", "min": 1, "action": "fail"},
    {"metric": "exact.sft", "min": 0, "action": "fail"},
    {"metric": "parity.live.top1", "min": 0.9, "action": "fail"},
    {"metric": "parity.live.chat_template", "min": 1, "action": "fail"},
    {"metric": "serving.openai_format", "min": 1, "action": "fail"},
    {"metric": "serving.tokens_per_second", "min": 0.1, "action": "fail"},
]


@pytest.fixture
def open_home() -> Iterator[Path]:
    """A state folder that Postgres' own user can reach when the tests run as root; pytest's are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="parampara-line-"))
    folder.chmod(0o755)
    yield folder / "home"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not (ROOT / ".venv-vllm/bin/python").exists(), reason="needs the vLLM environment: make setup")
def test_the_line_from_base_model_to_cited_answer(tmp_path: Path, open_home: Path) -> None:
    recipe = yaml.safe_load((ROOT / "recipes/tiny-cpu.yaml").read_text(encoding="utf-8"))
    for stage, values in QUICK.items():
        recipe["stages"][stage]["train"].update(values)
        recipe["stages"][stage]["train"].update(checkpoint_steps=4 if stage == "dapt" else 50)
    recipe["stages"]["evaluate"].update(max_questions=16, max_chunks=4, parity_prompts=4)
    recipe["stages"]["quantize"].update(max_questions=16, max_chunks=4)
    recipe["stages"]["deploy"]["alias"] = "expert"  # the demo asks where its recipe deploys, whatever the name
    recipe["gates"] = GATES
    path = tmp_path / "quick.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    home = open_home

    done = subprocess.run(
        [str(Path(sys.executable).parent / "parampara"), "demo", "--recipe", str(path), "--auto-ports"],
        env={**os.environ, "PARAMPARA_HOME": str(home), "PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    report = json.loads((home / "demo" / "report.json").read_text(encoding="utf-8"))
    assert {stage["stage"] for stage in report["stages"]} == {"dapt", "merge_dapt", "sft", "merge", "quantize", "evaluate", "deploy"}
    assert all(stage["status"] == "succeeded" for stage in report["stages"])
    assert all(gate["passed"] for gate in report["gates"])
    assert {gate["metric"] for gate in report["gates"]} == {gate["metric"] for gate in GATES}
    assert {"parity.live.kl", "serving.tokens_per_second_4_streams"} <= report["metrics"].keys()
    assert len(report["answers"]) == 3
    for answer in report["answers"]:
        assert answer["model"] == report["model"]
        assert answer["model"].startswith("ft:tiny-llama:")
        assert answer["text"].strip()
        assert answer["citations"]
        assert not answer["matches"] or any(citation["cited"] for citation in answer["citations"]), answer
    assert "<svg" in (home / "demo" / "report.html").read_text(encoding="utf-8")
    assert "vllm" in "".join(path.name for path in (home / "model_server").iterdir())
