"""Embeddings over HTTP, in batches, patient with a server that is starting or busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

import httpx

from parampara.errors import InvalidData, Unavailable, UpstreamFailed

BATCH = 32
PATIENCE_SECONDS = 120.0
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 5.0
_BUSY = (429, 502, 503, 504)


class EmbeddingClient:
    """Any server that speaks OpenAI's ``/v1/embeddings``. A context manager."""

    def __init__(
        self, url: str, model: str, *, patience_seconds: float = PATIENCE_SECONDS, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        self._url, self._model, self._patience = f"{url.rstrip('/')}/v1/embeddings", model, patience_seconds
        self._on_wait = on_wait
        self._http = httpx.Client(timeout=httpx.Timeout(120, connect=5), trust_env=False)

    def __enter__(self) -> EmbeddingClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector per text, at most :data:`BATCH` texts.

        Raises:
            Unavailable: no answer within the patience.
            InvalidData: the server refuses the texts.
            UpstreamFailed: it answers something else than vectors.
        """
        response = self._post({"model": self._model, "input": list(texts), "encoding_format": "float"})
        if 400 <= response.status_code < 500:
            raise InvalidData(f"The embedder refused the texts (status {response.status_code}): {response.text[:300]}", param="documents")
        try:
            data = sorted(response.raise_for_status().json()["data"], key=lambda item: item["index"])
            vectors = [item["embedding"] for item in data]
        except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
            raise UpstreamFailed(f"{self._url} did not answer with embeddings: {error!r}.") from error
        if len(vectors) != len(texts) or len({len(vector) for vector in vectors}) > 1:
            raise UpstreamFailed(f"{self._url} answered {len(vectors)} vectors for {len(texts)} texts, or of unequal lengths.")
        return vectors

    def _post(self, body: dict[str, object]) -> httpx.Response:
        deadline, wait = time.monotonic() + self._patience, _FIRST_WAIT
        while True:
            fault = ""
            try:
                response = self._http.post(self._url, json=body)
                if response.status_code not in _BUSY:
                    return response
                fault = f"status {response.status_code}"
            except httpx.TransportError as error:
                fault = repr(error)
            if time.monotonic() + wait > deadline:
                raise Unavailable(f"The embedder at {self._url} gave no vectors for {self._patience:g} s ({fault}). Is it running?")
            self._on_wait()
            time.sleep(wait)
            wait = min(wait * 2, _LONGEST_WAIT)
