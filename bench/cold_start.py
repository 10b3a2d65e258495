"""From the start of a training stage to its first step: started by itself, forked from a preloaded process, and in a warm one.

    python bench/cold_start.py [--rounds 5] [--backend trl]

The three arms take turns in one run on a tiny Llama. ``warm`` calls the stage function in a process that has run it before:
what no start can beat. CPU-seconds are the process's own up to its first step, so that other work on the machine matters
little; wall time is told beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from parampara.execution.preloaded import Preloaded
from parampara.execution.process import SpawnedStage, StageProcess
from parampara.progress import SilentProgress
from parampara.schemas.stages import DaptConfig
from tests.tiny_models import make_model
from tests.trainer.runs import dapt_config, write_book

_ALLOWANCE_SECONDS = 0.5


class FirstStep(SilentProgress):
    """Notes the clocks at the first step."""

    cpu = wall = 0.0

    def step(self, step: int, total: int, **metrics: float) -> None:
        if not self.cpu:
            self.cpu, self.wall = time.process_time(), time.monotonic()


def warm(config: DaptConfig, workdir: Path) -> tuple[float, float]:
    from trainer import dapt

    progress, cpu, wall = FirstStep(), time.process_time(), time.monotonic()
    dapt.run(config, workdir=workdir, progress=progress)
    return progress.cpu - cpu, progress.wall - wall


def started(stage: StageProcess | None, workdir: Path, wall: float) -> tuple[float, float]:
    """CPU-seconds of the stage's process, and wall time since ``wall``, when its first step is in ``progress.jsonl``."""
    if stage is None:
        raise SystemExit("the preloaded process refused the stage; see the log above")
    process, progress = psutil.Process(stage.pid), workdir / "progress.jsonl"
    while not (progress.exists() and b'"type": "step"' in progress.read_bytes()):
        if (code := stage.wait(0)) is not None:
            raise SystemExit(f"the stage ended with {code}: {stage.log_tail()[-2000:]}")
        time.sleep(0.005)
    cpu, seconds = sum(process.cpu_times()[:2]), time.monotonic() - wall
    while stage.wait(60) is None:
        continue
    return cpu, seconds


def measure(rounds: int, backend: str, folder: Path) -> dict[str, list[tuple[float, float]]]:
    base = make_model(folder / "base")
    config = dapt_config(base, write_book(folder / "book.txt"), backend=backend, max_steps=3)
    preloaded = Preloaded("trainer", backend)
    preloaded.start()
    warm(config, folder / "first")  # and meanwhile the other process imports
    figures: dict[str, list[tuple[float, float]]] = {"warm": [], "forked": [], "spawned": []}
    for number in range(rounds):
        figures["warm"].append(warm(config, folder / f"warm-{number}"))
        for arm in ("forked", "spawned"):
            workdir = folder / f"{arm}-{number}"
            workdir.mkdir()
            (workdir / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
            wall, log = time.monotonic(), workdir / "log"
            if arm == "forked":
                while (stage := _fork(preloaded, workdir, log)) is None and not number:
                    if preloaded.fault:
                        raise SystemExit(preloaded.fault)
                    time.sleep(0.2)  # before the first round it may still import
                    wall = time.monotonic()
            else:
                stage = SpawnedStage(service="trainer", kind="dapt", workdir=workdir, log=log)
            figures[arm].append(started(stage, workdir, wall))
    preloaded.stop()
    return figures


def _fork(preloaded: Preloaded, workdir: Path, log: Path) -> StageProcess | None:
    preloaded.start()
    return preloaded.launch(kind="dapt", config=workdir / "config.json", workdir=workdir, log=log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", choices=["trl", "unsloth"], default="trl")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.rounds, arguments.backend, Path(folder))
    report: dict[str, Any] = {
        "backend": arguments.backend,
        "rounds": arguments.rounds,
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
    for arm, pairs in figures.items():
        report[arm] = {
            "cpu_s": round(statistics.median(cpu for cpu, _ in pairs), 3),
            "wall_s": round(statistics.median(wall for _, wall in pairs), 3),
        }
    above = report["forked"]["cpu_s"] - report["warm"]["cpu_s"]
    report["forked_above_warm_cpu_s"], report["goal"] = round(above, 3), f"<= {_ALLOWANCE_SECONDS}: {above <= _ALLOWANCE_SECONDS}"
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
