"""``parampara``: the standalone stack and a thin client of its REST API."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import psutil
import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.table import Table

from parampara.errors import InvalidRequest, ParamparaError
from standalone import failures, state
from standalone.client import Target
from standalone.places import find_places

app = typer.Typer(no_args_is_help=True, add_completion=False)
runs = typer.Typer(help="Runs of a recipe.", no_args_is_help=True)
app.add_typer(runs, name="run")
console = Console()
errors = Console(stderr=True)

BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", envvar="PARAMPARA_BASE_URL", help="A platform that runs elsewhere, e.g. http://127.0.0.1:8000/v1."),
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="PARAMPARA_API_KEY", help="Its key; in the variable no process list shows it.")
]
AutoPorts = Annotated[bool, typer.Option("--auto-ports", help="Take free ports where the configured ones are taken.")]


@app.callback()
def options(context: typer.Context, base_url: BaseUrl = None, api_key: ApiKey = None) -> None:
    """Parampara: from a base model to a served domain expert.

    Commands that talk to a platform take the stack of this folder, or the one that --base-url names.
    """
    with _failures():
        context.obj = Target(find_places(), base_url, api_key)


@app.command()
def up(context: typer.Context, auto_ports: AutoPorts = False) -> None:
    """Start the whole stack and keep it up until Ctrl-C."""
    from standalone.display import StackDisplay
    from standalone.stack import Stack

    places = _target(context).places
    display = StackDisplay(console)
    began = time.monotonic()

    def ready(stack: state.StackState) -> None:
        display.close()
        console.print(f"Parampara is up ({time.monotonic() - began:.0f} s).", style="bold green")
        console.print(f"  base URL  {stack.base_url}    docs {stack.gateway_url}/docs", highlight=False)
        console.print(f"  API key   {places.api_key}", highlight=False, soft_wrap=True)
        console.print(f"  logs      {places.logs}", highlight=False, soft_wrap=True)
        console.print("  Ctrl-C stops it.", highlight=False)

    with _failures():
        try:
            Stack(places, display, auto_ports=auto_ports).run(on_ready=ready)
        finally:
            display.close()


@app.command()
def down(context: typer.Context) -> None:
    """Stop the stack that runs on this home folder."""
    places = _target(context).places
    with _failures():
        running = state.running(places)
        os.kill(running.pid, signal.SIGTERM)
        deadline = time.monotonic() + 120
        while state.is_running(places):
            if time.monotonic() > deadline:
                raise ParamparaError(f"The stack (pid {running.pid}) did not stop within two minutes; logs: {places.logs}")
            time.sleep(0.2)
        console.print("stopped")


@app.command()
def status(context: typer.Context) -> None:
    """Show the processes of the running stack. Exit code 1 when one of them is not ready."""
    places = _target(context).places
    with _failures():
        running = state.running(places)
    table = Table(box=None, pad_edge=False)
    for name in ("process", "state", "pid", "memory", "restarts", "address"):
        table.add_column(name, justify="right" if name in ("pid", "memory", "restarts") else "left")
    for record in running.processes:
        table.add_row(record.name, record.state, str(record.pid or ""), _memory(record.pid), str(record.restarts), record.where)
    console.print(f"{running.base_url}  ({running.status}, pid {running.pid}, home {places.home})", highlight=False, soft_wrap=True)
    console.print(table)
    raise typer.Exit(0 if all(record.state == "ready" for record in running.processes) else 1)


@app.command()
def demo(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Option(help="Recipe to run instead of recipes/tiny-cpu.yaml.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make everything again, also what an earlier run has made.")] = False,
    auto_ports: AutoPorts = False,
) -> None:
    """Run the main job from base model to cited answers, on this machine, and write a report."""
    from standalone.demo.story import run_demo

    with _failures():
        raise typer.Exit(run_demo(_target(context), console, recipe=recipe, fresh=fresh, auto_ports=auto_ports))


@app.command()
def ask(
    context: typer.Context,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: Annotated[str, typer.Option(help="Alias or model id.")] = "kp",
) -> None:
    """Ask a served model through the gateway; the answer streams."""
    from standalone.asking import Question, ask_model
    from standalone.client import Platform

    with _failures(), Platform.of(_target(context)) as platform:
        answer = ask_model(platform, Question(text=question, streamed=True), model=model, on_text=lambda text: console.out(text, end=""))
        console.print()
        for citation in answer.citations:
            if citation.cited:
                console.print(f"  {citation.marker} {citation.title}: {citation.text[:160]}", style="dim", highlight=False, markup=False)


@runs.command("submit")
def submit(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    books: Annotated[list[Path], typer.Option(help="Books for DAPT; repeat for each.")],
    qa: Annotated[list[Path], typer.Option(help="Q&A files (JSONL); repeat for each.")],
    books_validation: Annotated[list[Path] | None, typer.Option(help="Held-out text.")] = None,
    qa_validation: Annotated[list[Path] | None, typer.Option(help="Held-out questions.")] = None,
    preferences: Annotated[list[Path] | None, typer.Option(help="Preferences (JSONL) for a recipe with stage dpo.")] = None,
    preferences_validation: Annotated[list[Path] | None, typer.Option(help="Held-out preferences.")] = None,
    reuse: Annotated[bool, typer.Option(help="Take products of equal earlier jobs.")] = True,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to the end.")] = False,
) -> None:
    """Upload the data, start a run and print its id."""
    from standalone.client import Platform
    from standalone.submitting import submit_run

    with _failures(), Platform.of(_target(context)) as platform:
        data = {
            "books": books,
            "qa": qa,
            "books_validation": books_validation or [],
            "qa_validation": qa_validation or [],
            "preferences": preferences or [],
            "preferences_validation": preferences_validation or [],
        }
        run = submit_run(platform, recipe, data, reuse=reuse)
        console.print(run["id"], highlight=False)
        if watch:
            _watch(platform, run["id"])


@runs.command("watch")
def watch_run(context: typer.Context, run_id: Annotated[str, typer.Argument()]) -> None:
    """Follow a run to its end. Exit code 0 only if it succeeded."""
    from standalone.client import Platform

    with _failures(), Platform.of(_target(context)) as platform:
        _watch(platform, run_id)


@runs.command("list")
def list_runs(context: typer.Context, limit: Annotated[int, typer.Option(min=1, max=100)] = 20) -> None:
    """Newest runs first."""
    from standalone.client import Platform

    with _failures(), Platform.of(_target(context)) as platform:
        table = Table(box=None, pad_edge=False)
        for name in ("run", "name", "status", "gate", "model"):
            table.add_column(name)
        for run in platform.get("/runs", limit=limit)["data"]:
            table.add_row(run["id"], run["name"], run["status"], run["gate"] or "", run["model"] or "")
        console.print(table)


def _watch(platform, run_id: str) -> None:
    from standalone.follow import follow

    if follow(platform, run_id, console)["status"] != "succeeded":
        raise typer.Exit(1)


def _target(context: typer.Context) -> Target:
    return context.ensure_object(Target)


def _memory(pid: int | None) -> str:
    try:
        return f"{psutil.Process(pid).memory_info().rss / 2**20:.0f} MB" if pid else ""
    except psutil.Error:
        return ""


@contextmanager
def _failures() -> Iterator[None]:
    """Errors of the platform, of settings and of files become one message and an exit code (2: what was asked); no traceback."""
    try:
        yield
    except ParamparaError as error:
        _show_error(error.message)
        raise typer.Exit(2 if isinstance(error, InvalidRequest) else 1) from None
    except (ValidationError, SettingsError) as error:
        if (fault := failures.of_settings(error)) is None:
            raise
        _show_error(fault)
        raise typer.Exit(2) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever reads our output has seen enough; typer ends quietly
            raise
        _show_error(failures.of_files(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)


def _show_error(message: str) -> None:
    errors.print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
