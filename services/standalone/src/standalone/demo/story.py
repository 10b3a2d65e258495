"""The demo's course: stack, data, run, knowledge base, questions, report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from parampara.errors import InvalidRequest, ParamparaError, UpstreamFailed
from parampara.schemas.recipe import load_recipe
from standalone import state
from standalone.asking import Answer, Question, ask_model
from standalone.client import Platform, Target
from standalone.demo import report
from standalone.demo.background import Background
from standalone.demo.knowledge import knowledge_base
from standalone.follow import duration, follow
from standalone.places import Places
from standalone.processes import tail
from standalone.submitting import create_run, upload_all

ASKED = (("star_lord", "english", False), ("next_lord", "english", True), ("star_lord", "hinglish", False))
"""Kind, language and whether the answer is streamed, of the three questions; each is taken from the held-out set."""


class Timer:
    """Seconds of each part of the demo, in order."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.parts[name] = round(time.monotonic() - began, 2)


def run_demo(target: Target, console: Console, *, recipe: Path | None, fresh: bool, auto_ports: bool) -> int:
    """Play the whole demo and return its exit code: 0 only if every stage succeeded and the new model answered every question.

    Raises:
        InvalidRequest: the recipe is none, or deploys nothing; said before anything is started.
    """
    places = target.places
    recipe = recipe or places.project / "recipes" / "tiny-cpu.yaml"
    alias = alias_of(recipe)
    report.remove(places.demo)
    console.print(f"Parampara demo: {recipe.name}, from base model to cited answers", style="bold", highlight=False)
    timer, began = Timer(), time.monotonic()
    with ExitStack() as cleanup:
        try:
            with timer.part("stack"):
                _stack(target, console, cleanup, auto_ports=auto_ports)
            with timer.part("data"):
                data = make_data(places, console)
            platform = cleanup.enter_context(Platform.of(target))
            with timer.part("upload"):
                files = upload_all(platform, data)
                console.print(f"  uploaded {sum(map(len, files.values()))} files to {platform.base_url}/files", highlight=False)
            with timer.part("run"):
                run = create_run(platform, recipe, files, reuse=not fresh, metadata={"demo": "true"})
                console.print(f"  run {run['id']} of {recipe.name}", highlight=False)
                run = follow(platform, run["id"], console)
            _require_success(platform, run)
            with timer.part("knowledge base"):
                store = knowledge_base(platform, files["books"], data["books"], console, fresh=fresh)
                platform.post(f"/aliases/{alias}", {"vector_store_id": store})
            with timer.part("questions"):
                answers = [_ask(platform, question, run, console) for question in questions(data["qa_validation"][0])]
            timer.parts["total"] = round(time.monotonic() - began, 2)
            told = report.collect(platform, run, answers=answers, timings=timer.parts, recipe=recipe.name, store=store)
            page = report.write(told, places.demo)
        except ParamparaError as error:
            return _failed(target, console, error)
        report.show(told, console)
        console.print(f"  report   {page}\n  data     {places.demo / 'data'}", highlight=False, soft_wrap=True)
        _show_way_on(target, console, ask=f'parampara ask --model {alias} "..."')
        console.print(f"done in {duration(timer.parts['total'])}: every stage succeeded, every question was answered", style="bold green")
    return 0


def alias_of(recipe: Path) -> str:
    """The alias that a recipe deploys under, which is where the demo asks its questions.

    Raises:
        InvalidRequest: no recipe, or one whose ``deploy`` is null.
    """
    deploy = load_recipe(recipe).stages.deploy
    if deploy is None:
        message = f"{recipe}: stages.deploy is null, and the demo asks the model that it has deployed; `parampara run submit` takes it."
        raise InvalidRequest(message, param="recipe.stages.deploy")
    return deploy.alias


def make_data(places: Places, console: Console) -> dict[str, list[Path]]:
    """Books as shipped, questions as computed by the example's generator.

    Raises:
        UpstreamFailed: the generator failed; with its words.
    """
    source, target = places.project / "examples" / "kp", places.demo / "data"
    target.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(source / "generate.py"), "--out", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UpstreamFailed(f"{source / 'generate.py'} failed:\n{done.stderr[-2000:]}", code="generator_failed")
    data = {
        "books": sorted((source / "books").glob("*.txt")),
        "books_validation": sorted((source / "books_heldout").glob("*.txt")),
        "qa": [target / "train.jsonl"],
        "qa_validation": [target / "heldout.jsonl"],
    }
    rows = {name: sum(1 for _ in data[name][0].open(encoding="utf-8")) for name in ("qa", "qa_validation")}
    console.print(f"  {len(data['books'])} books, {rows['qa']} questions with answers, {rows['qa_validation']} held out", highlight=False)
    return data


def questions(heldout: Path) -> list[Question]:
    """Three closed-book questions of the held-out set, with the fact that answers each."""
    rows = [json.loads(line) for line in heldout.read_text(encoding="utf-8").splitlines()]
    asked = []
    for kind, language, streamed in ASKED:
        row = next(
            row
            for row in rows
            if row["metadata"]["kind"] == kind and row["metadata"]["language"] == language and row["messages"][0]["role"] == "user"
        )
        text = row["messages"][0]["content"]
        asked.append(Question(text=text, language=language, streamed=streamed, expected=row["metadata"]["expected"]))
    return asked


def _stack(target: Target, console: Console, cleanup: ExitStack, *, auto_ports: bool) -> None:
    if target.base_url is not None:
        console.print(f"  using the platform at {target.base_url}", highlight=False)
        return
    places = target.places
    if state.is_running(places):
        running = state.running(places)
        console.print(f"  using the stack that runs at {running.gateway_url}", highlight=False)
        return
    places.logs.mkdir(parents=True, exist_ok=True)
    background = cleanup.enter_context(Background(places, auto_ports=auto_ports))
    running = background.wait_ready(console)
    console.print(f"  stack is up at {running.gateway_url} ({len(running.processes)} processes)", highlight=False)


def _show_way_on(target: Target, console: Console, *, ask: str) -> None:
    if target.base_url is None:
        console.print(f"  logs     {target.places.logs}", highlight=False, soft_wrap=True)
        console.print(f"  go on    `make up` serves this model again; then `{ask}`", highlight=False)
    else:
        console.print(f"  go on    `{ask}` with the same PARAMPARA_BASE_URL and PARAMPARA_API_KEY", highlight=False)


def _ask(platform: Platform, question: Question, run: dict[str, Any], console: Console) -> Answer:
    """Ask the alias, show what comes and check it."""
    how = "streamed" if question.streamed else "plain"
    console.print(f"\n  [{question.language}, {how}] {question.text}", style="bold", highlight=False, markup=False)
    answer = ask_model(platform, question, model=run["alias"])
    report.show_answer(answer, console)
    check_answer(answer, model=run["model"])
    return answer


def check_answer(answer: Answer, *, model: str) -> None:
    """Insist that the model this run made has answered from retrieved passages, and that a right answer cites one.

    What differs from the computed fact stands in no passage, so it may be left without a citation; it is shown as wrong.

    Raises:
        UpstreamFailed: another model has answered, nothing was retrieved, or none of the passages says what was answered.
    """
    asked = repr(answer.question.text)
    if answer.model != model:
        raise UpstreamFailed(f"{asked} was answered by {answer.model}, not by the model of this run ({model}).", code="wrong_model")
    if not answer.citations:
        raise UpstreamFailed(f"{asked} was answered without a passage of the knowledge base.", code="no_passages")
    if answer.matches is not False and not any(citation.cited for citation in answer.citations):
        message = f"{asked} was answered, but neither the model nor the gateway found a passage that says so."
        raise UpstreamFailed(message, code="not_cited")


def _require_success(platform: Platform, run: dict[str, Any]) -> None:
    """Every job of the run succeeded, deployment included.

    Raises:
        UpstreamFailed: names the job, its error and the end of its log.
    """
    failed = [job for job in run["jobs"] if job["status"] != "succeeded"]
    if run["status"] == "succeeded" and not failed:
        return
    if run["status"] == "succeeded":
        missed = [
            f"{gate['metric']} = {gate['value']} (min {gate['min']}, max {gate['max']})" for gate in run["gates"] if not gate["passed"]
        ]
        raise UpstreamFailed(f"The gates held the model back, so nothing was deployed: {'; '.join(missed)}", code="held_by_gate")
    job = next((job for job in failed if job["status"] == "failed"), failed[0] if failed else None)
    if job is None:
        raise UpstreamFailed(f"Run {run['id']} ended as {run['status']}: {run['error']}", code="run_failed")
    detail = platform.get(f"/jobs/{job['id']}")
    message = (job["error"] or run["error"] or {}).get("message", job["status"])
    log = "\n".join((detail["log_tail"] or "").splitlines()[-20:])
    raise UpstreamFailed(f"Stage {job['name']} {job['status']}: {message}\n--- end of its log\n{log}", code="stage_failed")


def _failed(target: Target, console: Console, error: ParamparaError) -> int:
    console.print(f"\nThe demo failed: {error.message}", style="bold red", highlight=False, markup=False, soft_wrap=True)
    if target.base_url is not None:
        return 1
    places = target.places
    up_log = places.logs / "up.log"
    if error.code == "stack_failed" and up_log.exists():
        console.print(tail(up_log, lines=25), highlight=False, markup=False, soft_wrap=True)
    console.print(f"  logs of every process: {places.logs}", highlight=False, soft_wrap=True)
    console.print(f"  working folders of stages: {places.home / 'work'}", highlight=False, soft_wrap=True)
    if shutil.disk_usage(places.home).free < 2**30:
        console.print(f"  less than 1 GB is free on the disk of {places.home}", highlight=False, soft_wrap=True)
    return 1
