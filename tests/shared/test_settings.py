"""Settings that can not work are refused where they are read."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from parampara.settings import Settings, WorkerSettings


def test_a_heartbeat_fits_three_times_into_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    assert WorkerSettings(lease_seconds=30, heartbeat_seconds=10).heartbeat_seconds == 10
    monkeypatch.setenv("PARAMPARA_WORKER__LEASE_SECONDS", "5")
    with pytest.raises(ValidationError, match="heartbeat_seconds 7 is above a third of lease_seconds 5"):
        Settings()


def test_nothing_is_published_by_default() -> None:
    settings = Settings()
    hosts = [settings.control_plane.host, settings.gateway.host, settings.model_server.host, settings.embedder.host]
    assert {*hosts, settings.worker.metrics_host} == {"127.0.0.1"}


@pytest.mark.parametrize(
    "url", ["judge.example.com/v1", "file:///etc/passwd", "http://user:key@judge/v1", "https://judge/v1?key=x", "http:///v1"]
)
def test_a_judges_address_is_plain(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMPARA_EVALUATOR__JUDGE_BASE_URL", url)
    with pytest.raises(ValidationError, match="without a user, a query or a fragment"):
        Settings()


def test_an_empty_address_is_no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMPARA_EVALUATOR__JUDGE_BASE_URL", "")
    assert Settings().evaluator.judge_base_url is None
    monkeypatch.setenv("PARAMPARA_EVALUATOR__JUDGE_BASE_URL", "https://judge.example.com/v1/")
    monkeypatch.setenv("PARAMPARA_EVALUATOR__JUDGE_API_KEY", "sk-secret")
    assert Settings().evaluator.judge_base_url == "https://judge.example.com/v1"
    assert "sk-secret" not in repr(Settings())
