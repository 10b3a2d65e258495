"""A gateway over a real database, embedder and control plane, with one deployed model behind the alias ``kp``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy.orm import Session, sessionmaker

from gateway.app import Gateway
from parampara.db.models import Alias, ApiKey, Artifact, Model
from parampara.keys import hash_key, hint, new_key, read_pepper
from parampara.settings import Settings
from tests.gateway.servers import ScriptedModel, embedder_url, scripted_model, served

__all__ = ["embedder_url"]
MODEL = "ft:tiny-llama:parampara:expert:0123abcd"
ARTIFACT = "sha256:" + "0" * 64


_client = httpx.Client(timeout=30, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


@dataclass
class Running:
    """A gateway that answers, and what a test needs to talk to it."""

    url: str
    key: str
    settings: Settings
    sessions: sessionmaker[Session]
    script: ScriptedModel

    @property
    def http(self) -> httpx.Client:
        _client.base_url = httpx.URL(self.url)
        _client.headers["authorization"] = f"Bearer {self.key}"
        return _client

    @property
    def sdk(self) -> openai.OpenAI:
        """The official SDK, refusing every answer that differs from its types."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=30, _strict_response_validation=True)

    def ask(self, text: str = "Who rules Ashwini?", **change: Any) -> httpx.Response:
        body = {"model": "kp", "messages": [{"role": "user", "content": text}], **change}
        return self.http.post("/v1/chat/completions", json=body)


def add_key(sessions: sessionmaker[Session], settings: Settings, *scopes: str) -> str:
    key = new_key()
    with sessions.begin() as session:
        row = ApiKey(id=f"key_{key[3:15]}", name="test", hint=hint(key), hash=hash_key(read_pepper(settings), key), scopes=list(scopes))
        session.add(row)
    return key


@pytest.fixture
def script() -> Iterator[ScriptedModel]:
    with scripted_model(MODEL) as script:
        yield script


@pytest.fixture
def start_gateway(settings: Settings, sessions: sessionmaker[Session], script: ScriptedModel) -> Iterator[Callable[..., Running]]:
    """Start a gateway with some of its settings changed; one per test."""
    running: list[Any] = []

    def start(**change: Any) -> Running:
        settings.gateway = settings.gateway.model_copy(update={"refresh_seconds": 0.2, "connect_seconds": 1, **change})
        with sessions.begin() as session:
            session.add(Artifact(id=ARTIFACT, kind="quantized_model", bytes=1, manifest={}))
            session.flush()
            session.add(Model(id=MODEL, base_model="tiny-llama", artifact_id=ARTIFACT))
            session.flush()
            session.add(Alias(name="kp", model=MODEL, url=script.url, generation=1, active_generation=1))
        key = add_key(sessions, settings, "admin")
        context = served(Gateway(settings))
        url = context.__enter__()
        running.append(context)
        return Running(url, key, settings, sessions, script)

    yield start
    for context in running:
        context.__exit__(None, None, None)


@pytest.fixture
def gateway(start_gateway: Callable[..., Running]) -> Running:
    return start_gateway()
