"""One served model as its clients see it: requests to vLLM under the name that was deployed."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from model_server.live.openai_format import END_OF_STREAM
from parampara.errors import Preempted, Unavailable, UpstreamFailed
from parampara.execution import stop

ANSWER_SECONDS = 300.0
"""An 8B model on a CPU takes minutes for what a GPU answers at once."""


class Refused(UpstreamFailed):
    """vLLM answered a request with an error; what it was to measure stays unmeasured."""

    code = "live_request_refused"


class Endpoint:
    """``url`` is vLLM's base URL without ``/v1``; ``model`` the name that every request carries."""

    def __init__(self, client: httpx.Client, *, url: str, model: str) -> None:
        self._client = client
        self._url = url
        self.model = model

    def get(self, path: str) -> httpx.Response:
        """
        Raises:
            Unavailable: nobody answers.
            Preempted: the worker was asked to stop.
        """
        with _watched(path):
            return self._client.get(self._url + path, timeout=ANSWER_SECONDS)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """``body`` with the model's name, unless it has one. Raises as :meth:`get`."""
        with _watched(path):
            return self._client.post(self._url + path, json={"model": self.model, **body}, timeout=ANSWER_SECONDS)

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that answers ``POST path``.

        Raises:
            Refused: the status is not 200, or the answer no JSON object.
            Unavailable, Preempted: as :meth:`get`.
        """
        answer = self.post(path, body)
        if answer.status_code != 200:
            raise Refused(f"POST {path} was answered with {answer.status_code}: {answer.text[:300]}")
        try:
            told = answer.json()
        except ValueError:
            told = None
        if not isinstance(told, dict):
            raise Refused(f"POST {path} was not answered with a JSON object: {answer.text[:300]}")
        return told

    def stream(self, path: str, body: dict[str, Any]) -> Generator[tuple[float, str], None, None]:
        """When each ``data:`` field of a server-sent stream came (monotonic seconds) and what it holds.

        Closing the generator early ends the generation on the server. Raises as :meth:`ask`.
        """
        body = {"model": self.model, **body, "stream": True}
        with _watched(path), self._client.stream("POST", self._url + path, json=body, timeout=ANSWER_SECONDS) as answer:
            if answer.status_code != 200:
                raise Refused(f"POST {path} was answered with {answer.status_code}: {answer.read()[:300]!r}")
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    yield time.monotonic(), line.removeprefix("data:").strip()


def token_ids(event: str) -> list[int]:
    """Tokens that one event of a chat stream brings; vLLM tells them when asked with ``return_token_ids``."""
    if event == END_OF_STREAM:
        return []
    return [token for choice in json.loads(event).get("choices", []) for token in choice.get("token_ids") or []]


@contextmanager
def _watched(path: str) -> Iterator[None]:
    if stop.requested():
        raise Preempted("The worker was asked to stop while the live endpoint was measured; the next attempt measures again.")
    try:
        yield
    except httpx.HTTPError as error:
        message = f"vLLM stopped answering while the live endpoint was measured ({path}): {type(error).__name__} {error}"
        raise Unavailable(message, code="live_endpoint_away") from None
