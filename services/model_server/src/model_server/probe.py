"""Is vLLM really serving? ``/health`` and one generated answer."""

from __future__ import annotations

import httpx

from parampara.errors import UpstreamFailed

QUESTION = "Say in one line what you can help with."
_ANSWER_TOKENS = 16
_ANSWER_SECONDS = 120.0


async def healthy(client: httpx.AsyncClient, base: str) -> bool:
    """``GET /health`` answered 200 within the client's time limit."""
    try:
        return (await client.get(f"{base}/health")).status_code == 200
    except httpx.HTTPError:
        return False


async def first_answer(client: httpx.AsyncClient, base: str, model: str) -> str:
    """Generate a few tokens under the name that clients will use; a model without chat template answers as plain completion.

    Raises:
        UpstreamFailed: another model answers at that address, nothing was generated, or vLLM refused.
    """
    body = {"model": model, "max_tokens": _ANSWER_TOKENS, "temperature": 0}
    chat = await _post(client, f"{base}/v1/chat/completions", {**body, "messages": [{"role": "user", "content": QUESTION}]})
    if chat.status_code == 400 and "chat template" in chat.text.lower():
        chat = await _post(client, f"{base}/v1/completions", {**body, "prompt": QUESTION})
    if chat.status_code != 200:
        raise UpstreamFailed(f"vLLM answered the trial question with status {chat.status_code}: {chat.text[:300]}", code="no_answer")
    answer = chat.json()
    if answer.get("model") != model:
        raise UpstreamFailed(f"{base} serves {answer.get('model')!r} and not {model!r}.", code="wrong_model")
    if not (answer.get("usage") or {}).get("completion_tokens"):
        raise UpstreamFailed("vLLM generated no token for the trial question.", code="no_answer")
    choice = answer["choices"][0]
    return choice["message"]["content"] or "" if "message" in choice else choice["text"]


async def _post(client: httpx.AsyncClient, url: str, body: dict[str, object]) -> httpx.Response:
    try:
        return await client.post(url, json=body, timeout=_ANSWER_SECONDS)
    except httpx.HTTPError as error:
        raise UpstreamFailed(f"vLLM did not answer the trial question: {type(error).__name__} {error}", code="no_answer") from None
