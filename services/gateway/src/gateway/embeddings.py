"""``/v1/embeddings``: checked here, answered by the embedding service."""

from __future__ import annotations

import aiohttp
import orjson

from gateway import metrics
from gateway.exchange import Exchange
from gateway.fields import model_name, refuse_unknown
from gateway.upstream import calling, error_of
from parampara.errors import NotFound
from parampara.settings import Settings

_FIELDS = ("model", "input", "encoding_format", "dimensions", "user")


class Embeddings:
    def __init__(self, client: aiohttp.ClientSession, settings: Settings) -> None:
        self._client, self._settings = client, settings

    async def embed(self, exchange: Exchange) -> None:
        data = await exchange.json_object(self._settings.gateway.max_body_bytes)
        refuse_unknown(data, _FIELDS)
        name, known = model_name(data), self._settings.embedder.model
        if name != known:
            raise NotFound(f"The embedding model {name!r} is not served; use {known!r}.", param="model", code="model_not_found")
        exchange.model = known
        body = {key: value for key, value in data.items() if value is not None and key != "user"}
        await exchange.race(self._forward(exchange, orjson.dumps(body)))

    async def _forward(self, exchange: Exchange, body: bytes) -> None:
        url = f"{self._settings.gateway.embedder_url.rstrip('/')}/v1/embeddings"
        headers = {"content-type": "application/json", "x-request-id": exchange.request_id}
        async with calling("embedder", "embedder_unavailable"), self._client.post(url, data=body, headers=headers) as response:
            if response.status != 200:
                raise await error_of(response, "embedder")
            answer = await response.read()
        metrics.TOKENS.labels(self._settings.embedder.model, "prompt").inc(orjson.loads(answer)["usage"]["prompt_tokens"])
        await exchange.answer_json(answer)
