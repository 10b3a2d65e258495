"""Which platform a command talks to: this folder's stack, or the one that the options name."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from standalone.cli import app

KEY = "sk-parampara-elsewhere"


class Runs(BaseHTTPRequestHandler):
    """``GET /v1/runs`` of a platform with one run and one key."""

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == f"Bearer {KEY}"
        run = {"id": "run_far_away", "name": "tiny", "status": "succeeded", "gate": None, "model": None}
        error = {"message": "Incorrect API key.", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
        body = json.dumps({"data": [run]} if known else {"error": error}).encode()
        self.send_response(200 if known and self.path == "/v1/runs?limit=20" else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def elsewhere() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Runs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CliRunner:
    monkeypatch.setenv("PARAMPARA_HOME", str(tmp_path))
    monkeypatch.delenv("PARAMPARA_BASE_URL", raising=False)
    monkeypatch.delenv("PARAMPARA_API_KEY", raising=False)
    return CliRunner()


def test_options_and_variables_name_another_platform(cli: CliRunner, elsewhere: str) -> None:
    by_option = cli.invoke(app, ["--base-url", f"{elsewhere}/", "--api-key", KEY, "run", "list"])
    by_variable = cli.invoke(app, ["run", "list"], env={"PARAMPARA_BASE_URL": elsewhere, "PARAMPARA_API_KEY": KEY})
    for done in (by_option, by_variable):
        assert done.exit_code == 0, done.output
        assert "run_far_away" in done.output


def test_a_wrong_key_is_said_by_the_platform(cli: CliRunner, elsewhere: str) -> None:
    done = cli.invoke(app, ["--base-url", elsewhere, "--api-key", "wrong", "run", "list"])
    assert done.exit_code == 1
    assert "Incorrect API key" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base-url", "localhost:8000", "run", "list"], "PARAMPARA_BASE_URL is 'localhost:8000'"),
        (["--base-url", "http://127.0.0.1:1/v1", "run", "list"], "PARAMPARA_API_KEY"),
        (["--base-url", "http://127.0.0.1:1/v1", "--api-key", KEY, "run", "list"], "does not answer"),
        (["run", "list"], "No stack runs on"),
    ],
)
def test_what_is_missing_is_named(cli: CliRunner, arguments: list[str], said: str) -> None:
    done = cli.invoke(app, arguments)
    assert done.exit_code != 0
    assert said in done.stderr
    assert "Traceback" not in done.output
