"""Logs that can be searched by run, and that never hold a key."""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request

import pytest
import structlog

from parampara import telemetry


@pytest.fixture(autouse=True)
def _restore() -> object:
    root = logging.getLogger()
    handlers, level, configuration = root.handlers[:], root.level, structlog.get_config()
    yield
    root.handlers[:], root.level = handlers, level
    structlog.configure(**configuration)


def test_records_carry_service_and_context_also_from_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("trainer", log_format="json", level="INFO")
    with telemetry.bind(run_id="run_1", job_id="job_1", attempt=2):
        telemetry.get_logger("x").info("from us", step=3)
        logging.getLogger("library").warning("from %s", "them")
    telemetry.get_logger("x").info("outside")
    ours, theirs, outside = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    for record in (ours, theirs):
        assert (record["service"], record["run_id"], record["job_id"], record["attempt"]) == ("trainer", "run_1", "job_1", 2)
    assert (ours["event"], ours["step"], ours["level"], theirs["event"]) == ("from us", 3, "info", "from them")
    assert "run_id" not in outside


@pytest.mark.parametrize(
    "secret", ["Bearer abcdefgh12345678", "sk-abcdefgh12345678", "postgresql://user:hunter2secret@host/db", "redis://:hunter2secret@host"]
)
def test_keys_and_passwords_are_cut_out(secret: str) -> None:
    record = telemetry.redact(None, "info", {"event": f"saw {secret} here", "n": 1})
    assert "12345678" not in record["event"]
    assert "hunter2" not in record["event"]
    assert record["n"] == 1


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_nothing_gets_round_the_cut(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    telemetry.configure_logging("trainer", log_format=log_format, level="INFO")
    secret = "postgresql://user:hunter2secret@host/db Bearer abcdefgh12345678"
    try:
        raise RuntimeError(secret)
    except RuntimeError as error:
        telemetry.get_logger("x").exception("failed")
        telemetry.get_logger("x").error("failed", error=error, nested={"headers": [("Authorization", secret)], "n": 1})
        logging.getLogger("library").exception("from a library: %s", error)
        logging.getLogger("library").error(error)
    written = capsys.readouterr().err
    assert written.count("Traceback") == 2
    assert written.count("RuntimeError") >= 3
    assert "hunter2" not in written
    assert "12345678" not in written


def test_the_metrics_server_tells_why_it_is_not_ready() -> None:
    faults: list[str] = []
    server = telemetry.start_metrics_server(0, host="127.0.0.1", ready=lambda: faults)
    base = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        with urllib.request.urlopen(f"{base}/readyz") as answer:
            assert answer.read() == b"ok\n"
        with urllib.request.urlopen(f"{base}/metrics") as answer:
            assert b"python_info" in answer.read()
        faults.append("database: away")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{base}/readyz")
        assert (caught.value.code, caught.value.read()) == (503, b"database: away\n")
    finally:
        server.shutdown()
        server.server_close()
