"""The token path: ``/v1/chat/completions`` and ``/v1/completions``, streamed and not.

client -> fields checked -> (retrieval) -> model server -> back. No control plane, and no database for auth.
"""

from __future__ import annotations

import re
import time
from typing import Any

import orjson

from gateway import metrics
from gateway.answers import Cited, GroundedStream, count_usage, finish_whole
from gateway.directory import Directory, Target
from gateway.exchange import EVENT_STREAM_HEADERS, Exchange
from gateway.fields import Generation, check_chat, check_completion
from gateway.grounding import Grounded, Messages, ground
from gateway.messages import last_question, with_system_prompt
from gateway.retrieval import Retriever, SearchPlan, plan_of_tool
from gateway.sse import DONE, PING, events, frame, refuse_error
from gateway.upstream import ModelServers
from parampara.errors import UpstreamFailed
from parampara.keys import hash_key
from parampara.settings import Settings

_HOST = re.compile(r"[A-Za-z0-9._\-]{1,253}(:\d{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:\d{1,5})?")


class Completions:
    def __init__(self, directory: Directory, servers: ModelServers, retriever: Retriever, settings: Settings, *, pepper: bytes) -> None:
        self._directory, self._servers, self._retriever = directory, servers, retriever
        self._settings, self._pepper = settings, pepper

    async def chat(self, exchange: Exchange) -> None:
        data = await exchange.json_object(self._settings.gateway.max_body_bytes)
        request = check_chat(data, self._settings.gateway)
        await exchange.race(self._chat(exchange, request))

    async def complete(self, exchange: Exchange) -> None:
        """Raw prompts; nothing is retrieved for them, they have no place to put it."""
        data = await exchange.json_object(self._settings.gateway.max_body_bytes)
        request = check_completion(data)
        await exchange.race(self._complete(exchange, request))

    async def _chat(self, exchange: Exchange, request: Generation) -> None:
        target = await self._directory.resolve(request.model)
        exchange.model = target.model
        plan = self._plan(request, target)
        messages = with_system_prompt(request.messages, target.system_prompt)
        grounded = await self._ground(request, messages, target, plan) if plan else None
        body = {**request.body, "messages": grounded.messages if grounded else messages}
        if grounded is not None and grounded.max_tokens is not None:
            body["max_tokens"] = grounded.max_tokens
        await self._relay(exchange, request, target, "chat/completions", body, Cited(grounded, self._base_url(exchange)))

    async def _complete(self, exchange: Exchange, request: Generation) -> None:
        target = await self._directory.resolve(request.model)
        exchange.model = target.model
        await self._relay(exchange, request, target, "completions", request.body, Cited(None, ""))

    def _plan(self, request: Generation, target: Target) -> SearchPlan | None:
        if not request.retrieval:
            return None
        limit = self._settings.gateway.max_passages
        if request.file_search is not None:
            return plan_of_tool(request.file_search, attached=target.vector_store_id, limit=limit)
        return SearchPlan((target.vector_store_id,), limit) if target.vector_store_id else None

    async def _ground(self, request: Generation, messages: Messages, target: Target, plan: SearchPlan) -> Grounded:
        window = await self._servers.window(target.url, target.model)
        query = last_question(messages)
        passages = await self._retriever.find(query, plan)

        async def count(laid: Messages) -> int:
            return await self._servers.count_tokens(target.url, target.model, laid)

        return await ground(
            messages,
            passages,
            query=query,
            max_tokens=request.max_tokens,
            answer_tokens=self._settings.gateway.answer_tokens,
            window=window,
            count=count,
        )

    async def _relay(self, exchange: Exchange, request: Generation, target: Target, route: str, body: dict[str, Any], cited: Cited) -> None:
        body = {"model": target.model, **body}
        if self._settings.gateway.isolate_prompt_cache and exchange.principal is not None:
            body["cache_salt"] = hash_key(self._pepper, f"cache salt {exchange.principal.key_id}")[:32]
        url, started = f"{target.url}/v1/{route}", time.perf_counter()
        async with self._servers.post(url, body, request_id=exchange.request_id, stream=request.stream) as response:
            if request.stream:
                await self._stream(exchange, request, response.content, target.model, cited, started)
                return
            answer = await response.read()
        try:
            whole = finish_whole(orjson.loads(answer), model=target.model, cited=cited)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UpstreamFailed(f"The model server's answer is not a completion: {error!r}.") from error
        await exchange.answer_json(whole)

    async def _stream(self, exchange: Exchange, request: Generation, content: Any, model: str, cited: Cited, started: float) -> None:
        rewriter = GroundedStream(cited) if cited.grounded is not None else None
        waiting_for_first = True
        async for data in events(content, self._settings.gateway):
            if not exchange.started:  # not before the first event: a fault until then still gets its own status
                await exchange.start(200, EVENT_STREAM_HEADERS)
            if data is None:
                await exchange.write(PING)
            elif data == DONE:
                await exchange.write(frame(DONE), more=False)
            elif rewriter is None and b'"usage"' not in data and not data.startswith(b'{"error"'):
                await exchange.write(frame(data))  # the hot path: bytes through, nothing parsed
            else:
                await self._write_parsed(exchange, request, data, model, rewriter)
            if waiting_for_first and data and b'"content":""' not in data:
                waiting_for_first = False
                metrics.FIRST_TOKEN.labels(model).observe(time.perf_counter() - started)

    async def _write_parsed(
        self, exchange: Exchange, request: Generation, data: bytes, model: str, rewriter: GroundedStream | None
    ) -> None:
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise UpstreamFailed("The model server sent an event that is not JSON.") from error
        refuse_error(chunk)
        if not chunk.get("choices") and chunk.get("usage"):
            count_usage(model, chunk["usage"])
            if not request.include_usage:
                return
        for out in rewriter.rewrite(chunk) if rewriter else (chunk,):
            await exchange.write(frame(out))

    def _base_url(self, exchange: Exchange) -> str:
        if self._settings.gateway.public_url:
            return self._settings.gateway.public_url.rstrip("/")
        host = exchange.header(b"host") or ""
        if not _HOST.fullmatch(host):
            host = f"{self._settings.gateway.host}:{self._settings.gateway.port}"
        return f"{exchange.scope.get('scheme', 'http')}://{host}"
