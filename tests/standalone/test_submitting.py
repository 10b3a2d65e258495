"""``parampara run submit``: every data set that the command takes arrives in the run under its own name."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from standalone.cli import app


class Taking(BaseHTTPRequestHandler):
    """Gives each upload its own name as its id, and keeps the bodies of runs in ``server.runs``."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/files":
            answer = {"id": body.partition(b'filename="')[2].partition(b'"')[0].decode()}
        else:
            self.server.runs.append(json.loads(body))  # type: ignore[attr-defined]
            answer = {"id": "run_1"}
        told = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def platform() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Taking)
    server.runs = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("preferred", [True, False])
def test_every_data_set_is_uploaded_and_named(platform: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preferred: bool) -> None:
    monkeypatch.setenv("PARAMPARA_HOME", str(tmp_path))
    options = ["books", "qa", "books-validation", "qa-validation"]
    options += ["preferences", "preferences-validation"] if preferred else []
    given: list[str] = []
    for option in options:
        (tmp_path / option).write_text("text")
        given += [f"--{option}", str(tmp_path / option)]
    (tmp_path / "recipe.yaml").write_text("name: r")
    target = ["--base-url", f"http://127.0.0.1:{platform.server_port}/v1", "--api-key", "sk-parampara-1"]
    done = CliRunner().invoke(app, [*target, "run", "submit", str(tmp_path / "recipe.yaml"), *given])
    assert done.exit_code == 0, done.output
    (run,) = platform.runs
    pairs = {"preferences": ["preferences"], "preferences_validation": ["preferences-validation"]}
    assert run["recipe_yaml"] == "name: r"
    others = {"books": ["books"], "qa": ["qa"], "books_validation": ["books-validation"], "qa_validation": ["qa-validation"]}
    assert run["datasets"] == others | (pairs if preferred else {name: [] for name in pairs})
