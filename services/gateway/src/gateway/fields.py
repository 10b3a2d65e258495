"""Which request fields reach the engine. A list of what is allowed, because each unknown one may be the next way to stop it.

Known advisories behind the refusals: huge ``n``, ``min_tokens``, ``logit_bias``, ``allowed_token_ids``, grammars, and chat
templates sent by the caller have each killed or skewed an engine for everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.messages import check_messages
from parampara.errors import InvalidRequest
from parampara.settings import GatewaySettings

Check = Callable[[str, Any], Any]
MAX_N = 4
MAX_STOP = 4
MAX_PROMPTS = 16
MAX_FUNCTION_TOOLS = 64


def _number(low: float, high: float, *, integer: bool = False) -> Check:
    def check(name: str, value: Any) -> Any:
        right_type = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
        if not right_type or not low <= value <= high:
            kind = "a whole number" if integer else "a number"
            raise InvalidRequest(f"{name} must be {kind} from {low:,} to {high:,} (got {shown(value)}).", param=name)
        return value

    return check


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false (got {shown(value)}).", param=name)
    return value


def _stop(name: str, value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MAX_STOP or not all(isinstance(text, str) and 0 < len(text) <= 256 for text in texts):
        rule = f"a string, or a list of at most {MAX_STOP}, of 1 to 256 characters each"
        raise InvalidRequest(f"{name} must be {rule} (got {shown(value)}).", param=name)
    return value


def _drop(name: str, value: Any) -> None:
    """Accepted for compatibility; says nothing to the engine."""


def _stream_options(name: str, value: Any) -> dict[str, bool]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} must be an object.", param=name)
    for key in value:
        if key not in ("include_usage", "include_obfuscation"):
            raise InvalidRequest(f"{name}.{key} is not known here.", param=f"{name}.{key}", code="unknown_parameter")
    return {"include_usage": _boolean(f"{name}.include_usage", value.get("include_usage", False))}


_SAMPLING: dict[str, Check] = {
    "temperature": _number(0, 2),
    "top_p": _number(1e-6, 1),
    "top_k": _number(-1, 1_000_000, integer=True),
    "min_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 2),
    "seed": _number(-(2**63), 2**63 - 1, integer=True),
    "n": _number(1, MAX_N, integer=True),
    "max_tokens": _number(1, 1_048_576, integer=True),
    "stop": _stop,
    "stream": _boolean,
    "stream_options": _stream_options,
    "user": _drop,
    "metadata": _drop,
    "store": _drop,
    "service_tier": _drop,
    "safety_identifier": _drop,
    "prompt_cache_key": _drop,
}
_CHAT: dict[str, Check] = {
    **_SAMPLING,
    "max_completion_tokens": _number(1, 1_048_576, integer=True),
    "logprobs": _boolean,
    "top_logprobs": _number(0, 20, integer=True),
    "parallel_tool_calls": _boolean,
}
_COMPLETION: dict[str, Check] = {
    **_SAMPLING,
    "logprobs": _number(0, 5, integer=True),
    "echo": _boolean,
    "best_of": _number(1, 1, integer=True),
}
_CHAT_OTHER = ("model", "messages", "tools", "tool_choice", "response_format", "modalities")


@dataclass
class Generation:
    """A checked request. ``body`` holds what goes upstream, all but the model's name."""

    model: str
    body: dict[str, Any]
    stream: bool
    include_usage: bool
    max_tokens: int | None
    file_search: dict[str, Any] | None = None
    """The ``file_search`` tool as it came; checked by retrieval."""
    retrieval: bool = True
    """False under ``tool_choice: "none"``."""
    messages: list[dict[str, Any]] = field(default_factory=list)


def check_chat(data: Mapping[str, Any], settings: GatewaySettings) -> Generation:
    """Check the body of ``/v1/chat/completions``.

    Raises:
        InvalidRequest: names the field, its value and the limit.
    """
    body = _checked(data, _CHAT, _CHAT_OTHER)
    if data.get("modalities") not in (None, ["text"]):
        raise InvalidRequest('modalities must be ["text"]: this gateway serves text models.', param="modalities")
    if "max_completion_tokens" in body:
        body["max_tokens"] = body.pop("max_completion_tokens")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
    request = _generation(data, body)
    request.messages = check_messages(data.get("messages"), limit=settings.max_messages)
    _add_tools(request, data, settings)
    _add_response_format(request, data.get("response_format"), settings)
    return request


def check_completion(data: Mapping[str, Any]) -> Generation:
    """Check the body of ``/v1/completions``.

    Raises:
        InvalidRequest: names the field, its value and the limit.
    """
    body = _checked(data, _COMPLETION, ("model", "prompt"))
    body.pop("best_of", None)
    body["prompt"] = _prompt(data.get("prompt"))
    return _generation(data, body)


def model_name(data: Mapping[str, Any]) -> str:
    model = data.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= 256:
        raise InvalidRequest("model must be the name of a model, a string of 1 to 256 characters.", param="model", code=_missing(model))
    return model


def refuse_unknown(data: Mapping[str, Any], allowed: Mapping[str, Any] | tuple[str, ...]) -> None:
    """Raises InvalidRequest for the first key that is not allowed."""
    for name, value in data.items():
        if name not in allowed and value is not None:
            raise InvalidRequest(f"{name[:100]} is not supported here.", param=name[:100], code="unsupported_parameter")


def _checked(data: Mapping[str, Any], checks: Mapping[str, Check], others: tuple[str, ...]) -> dict[str, Any]:
    refuse_unknown(data, (*checks, *others))
    given = {name: value for name, value in data.items() if name in checks and value is not None}
    return {name: checks[name](name, value) for name, value in given.items() if checks[name] is not _drop}


def _generation(data: Mapping[str, Any], body: dict[str, Any]) -> Generation:
    stream = body.get("stream", False)
    options = body.pop("stream_options", None)
    if options is not None and not stream:
        raise InvalidRequest("stream_options needs stream: true.", param="stream_options")
    if stream:
        body["stream_options"] = {"include_usage": True}  # always, to count tokens; withheld from clients that did not ask
    return Generation(
        model=model_name(data),
        body=body,
        stream=stream,
        include_usage=bool(options and options["include_usage"]),
        max_tokens=body.get("max_tokens"),
    )


def _add_tools(request: Generation, data: Mapping[str, Any], settings: GatewaySettings) -> None:
    tools, choice = data.get("tools"), data.get("tool_choice")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InvalidRequest("tools must be a list of objects.", param="tools")
    searches = [tool for tool in tools or [] if tool.get("type") == "file_search"]
    functions = [tool for tool in tools or [] if tool.get("type") == "function"]
    if len(searches) + len(functions) != len(tools or []):
        raise InvalidRequest('Each tool must have the type "function" or "file_search".', param="tools")
    if len(searches) > 1 or len(functions) > MAX_FUNCTION_TOOLS:
        raise InvalidRequest(f"tools may hold one file_search and {MAX_FUNCTION_TOOLS} functions.", param="tools")
    request.file_search = searches[0] if searches else None
    request.retrieval = choice != "none"
    if functions:
        request.body["tools"] = functions
    else:
        request.body.pop("parallel_tool_calls", None)
    _add_tool_choice(request, choice, bool(functions), settings)


def _add_tool_choice(request: Generation, choice: Any, has_functions: bool, settings: GatewaySettings) -> None:
    named_search = isinstance(choice, dict) and choice.get("type") == "file_search"
    if choice is None or choice in ("none", "auto") or named_search:
        if has_functions and not named_search:
            request.body["tool_choice"] = choice or "auto"
        return
    if choice != "required" and not (isinstance(choice, dict) and choice.get("type") == "function"):
        raise InvalidRequest(f'tool_choice must be "none", "auto", "required" or name a tool (got {shown(choice)}).', param="tool_choice")
    if not has_functions:
        if choice == "required" and request.file_search is not None:
            return
        raise InvalidRequest("tool_choice names a function, but tools holds none.", param="tool_choice")
    if not settings.structured_outputs:
        raise _no_grammars("tool_choice")
    request.body["tool_choice"] = choice


def _add_response_format(request: Generation, value: Any, settings: GatewaySettings) -> None:
    if value is None:
        return
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise InvalidRequest(f"response_format.type must be text, json_object or json_schema (got {shown(kind)}).", param="response_format")
    if kind == "text":
        return
    if not settings.structured_outputs:
        raise _no_grammars("response_format")
    request.body["response_format"] = value


def _no_grammars(param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param} asks for a grammar, which this server does not allow; its operator can set PARAMPARA_GATEWAY__STRUCTURED_OUTPUTS=true.",
        param=param,
        code="unsupported_parameter",
    )


def _prompt(value: Any) -> Any:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        if all(isinstance(item, str) and item for item in value) and len(value) <= MAX_PROMPTS:
            return value
        if all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31 for item in value):
            return value
    raise InvalidRequest(
        f"prompt must be a non-empty string, a list of at most {MAX_PROMPTS} of them, or a list of token ids.",
        param="prompt",
        code=_missing(value),
    )


def _missing(value: Any) -> str:
    return "missing_required_parameter" if value is None else "invalid_value"


def shown(value: Any) -> str:
    """A value in an error message, however long it is."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
