"""The platform's REST API from the outside: only the public base URL and a key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from parampara.errors import InvalidRequest, NotFound, ParamparaError, Unauthorized, Unavailable
from standalone import state
from standalone.places import Places


@dataclass(frozen=True)
class Target:
    """Where a command goes: the stack of ``places``, or the platform at ``base_url``.

    Raises:
        InvalidRequest: ``base_url`` is no http address.
    """

    places: Places
    base_url: str | None = None
    """With ``/v1``, without a slash at its end."""
    api_key: str | None = None
    """For ``base_url``; the folder's own stack has its key in a file."""

    def __post_init__(self) -> None:
        if self.base_url is not None and not re.match(r"https?://[^/\s]+", self.base_url):
            raise InvalidRequest(f"PARAMPARA_BASE_URL is {self.base_url!r}; it must look like http://127.0.0.1:8000/v1.", param="base_url")


_KINDS: dict[int, type[ParamparaError]] = {401: Unauthorized, 404: NotFound, 503: Unavailable}


class Platform:
    """One open connection to a gateway; use as a context manager."""

    def __init__(self, base_url: str, api_key: str) -> None:
        self.base_url = base_url.rstrip("/")
        self.api_key = api_key
        headers = {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=self.base_url, headers=headers, timeout=60, trust_env=False)

    @classmethod
    def of(cls, target: Target) -> Platform:
        """The platform that ``target`` names.

        Raises:
            Unavailable: it names this folder's stack, and none runs.
            Unauthorized: there is no key for it.
        """
        if target.base_url is None:
            return cls(state.running(target.places).base_url, read_key(target.places))
        if not target.api_key:
            raise Unauthorized(f"No key for {target.base_url}: give it in PARAMPARA_API_KEY.", param="api_key")
        return cls(target.base_url, target.api_key)

    def __enter__(self) -> Platform:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, **query: Any) -> Any:
        return self._call("GET", path, params=query)

    def post(self, path: str, body: dict[str, Any] | None = None, **headers: str) -> Any:
        return self._call("POST", path, json=body or {}, headers=headers)

    def upload(self, path: Path, *, purpose: str) -> dict[str, Any]:
        """``POST /v1/files``.

        Raises:
            InvalidRequest: the file cannot be read, or the platform refuses it.
        """
        try:
            with path.open("rb") as file:
                return self._call("POST", "/files", files={"file": (path.name, file)}, data={"purpose": purpose})
        except OSError as error:
            raise InvalidRequest(f"Cannot read {path}: {error.strerror}.", param="file") from None

    def artifact_file(self, artifact_id: str, path: str) -> bytes:
        """One file of an artifact."""
        answer = self._send("GET", f"/artifacts/{artifact_id}/files/{path}")
        return answer.content

    def every(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """All items of a paged list."""
        after: str | None = None
        while True:
            page = self.get(path, **query, **({"after": after} if after else {}))
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["last_id"]

    def _call(self, method: str, path: str, **options: Any) -> Any:
        return self._send(method, path, **options).json()

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.base_url} does not answer: {type(error).__name__} {error}", code="gateway_away") from None
        if answer.status_code >= 400:
            raise _refusal(answer)
        return answer


def read_key(places: Places) -> str:
    """The admin key that the control plane wrote at its first start.

    Raises:
        Unauthorized: it is missing or may not be read.
    """
    try:
        return places.api_key.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise Unauthorized(f"Cannot read the API key in {places.api_key}: {error.strerror}.") from None


def _refusal(answer: httpx.Response) -> ParamparaError:
    try:
        error = answer.json()["error"]
        message, param, code = error["message"], error.get("param"), error.get("code")
    except (ValueError, KeyError, TypeError):
        message, param, code = answer.text[:300], None, None
    path = answer.request.url.path
    kind = _KINDS.get(answer.status_code, InvalidRequest if answer.status_code < 500 else Unavailable)
    return kind(f"{answer.request.method} {path}: {message}", param=param, code=code)
