"""The ``messages`` of a chat request: text only, known roles, known keys."""

from __future__ import annotations

from typing import Any

from parampara.errors import InvalidRequest

ROLES = ("system", "developer", "user", "assistant", "tool")
# what clients send back when they append an answer as it came
_IGNORED = {"annotations", "audio", "context", "function_call", "reasoning", "reasoning_content", "refusal"}
_KNOWN = {"role", "content", "name", "tool_calls", "tool_call_id"}


def check_messages(value: Any, *, limit: int) -> list[dict[str, Any]]:
    """Messages as they go upstream.

    Raises:
        InvalidRequest: ``param`` is the path, such as ``messages[2].content[0].type``.
    """
    if value is None:
        raise InvalidRequest("messages is missing.", param="messages", code="missing_required_parameter")
    if not isinstance(value, list) or not value:
        raise InvalidRequest("messages must be a non-empty list.", param="messages")
    if len(value) > limit:
        raise InvalidRequest(f"messages has {len(value)} entries; the limit is {limit}.", param="messages")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(value)]


def with_system_prompt(messages: list[dict[str, Any]], prompt: str | None) -> list[dict[str, Any]]:
    """``messages`` as the model was trained on them: its own system prompt first, where the client gives none."""
    if not prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": prompt}, *messages]


def last_question(messages: list[dict[str, Any]]) -> str:
    """Text of the newest user message, or nothing."""
    for message in reversed(messages):
        if message["role"] == "user":
            return text_of(message)
    return ""


def text_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content or [])


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} must be an object.", param=where)
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}.", param=f"{where}.role")
    for key, value in message.items():
        if key not in _KNOWN and key not in _IGNORED and value is not None:
            raise InvalidRequest(f"{where}.{key[:100]} is not supported here.", param=f"{where}.{key[:100]}", code="unsupported_parameter")
    kept = {key: message[key] for key in ("name", "tool_calls", "tool_call_id") if message.get(key)}
    for key in ("name", "tool_call_id"):
        if key in kept and not (isinstance(kept[key], str) and len(kept[key]) <= 256):
            raise InvalidRequest(f"{where}.{key} must be a string of at most 256 characters.", param=f"{where}.{key}")
    if "tool_calls" in kept and not (isinstance(kept["tool_calls"], list) and all(isinstance(call, dict) for call in kept["tool_calls"])):
        raise InvalidRequest(f"{where}.tool_calls must be a list of objects.", param=f"{where}.tool_calls")
    content = _content(message.get("content"), f"{where}.content", optional=role == "assistant")
    # chat templates of open models know "system"; "developer" is OpenAI's newer word for it
    return {"role": "system" if role == "developer" else role, "content": content, **kept}


def _content(value: Any, where: str, *, optional: bool) -> Any:
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{where} must be a string or a non-empty list of text parts.", param=where)
    return "\n".join(_part(part, f"{where}[{number}]") for number, part in enumerate(value))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return part["refusal"]
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InvalidRequest(
            f'{where} must be {{"type": "text", "text": ...}}: images, audio and files are not served here.', param=f"{where}.type"
        )
    return part["text"]
