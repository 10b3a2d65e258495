"""One hierarchy of errors for every service.

Each error knows its machine-readable ``code``, the HTTP ``status`` it becomes, the ``param`` (path of the field at fault)
and a message that says what to do next. Every error pickles, so it crosses process borders whole.
"""

from __future__ import annotations

from typing import Any

EXIT_OK = 0
EXIT_DISK_FULL = 73
EXIT_BUSY = 74
EXIT_PREEMPTED = 75
EXIT_DIVERGED = 76
EXIT_OUT_OF_MEMORY = 77
EXIT_BAD_INPUT = 78


class ParamparaError(Exception):
    """Base of every error that Parampara raises on purpose."""

    status = 500
    type = "server_error"
    code = "internal_error"
    exit_code = 1

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.param, self.code)

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error object: ``{"error": {"message", "type", "param", "code"}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def _rebuild(cls: type[ParamparaError], message: str, param: str | None, code: str) -> ParamparaError:
    return cls(message, param=param, code=code)


class InvalidRequest(ParamparaError, ValueError):
    """The caller sent something that can never succeed; ``param`` names the field."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"
    exit_code = EXIT_BAD_INPUT


class InvalidData(InvalidRequest):
    """A dataset, book or model directory is not what it has to be; the message names file, row and rule."""

    code = "invalid_data"


class Unauthorized(ParamparaError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(ParamparaError):
    status = 403
    type = "invalid_request_error"
    code = "insufficient_permissions"


class NotFound(ParamparaError, LookupError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"
    exit_code = EXIT_BAD_INPUT


class WrongState(InvalidRequest):
    """The object exists but its state forbids the action. 400, not 409: the OpenAI SDK retries a 409."""

    code = "wrong_state"


class PayloadTooLarge(InvalidRequest):
    status = 413
    code = "payload_too_large"


class RateLimited(ParamparaError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Unavailable(ParamparaError):
    """A dependency is away for now; the caller may try again."""

    status = 503
    type = "server_error"
    code = "service_unavailable"


class UpstreamFailed(ParamparaError):
    status = 502
    type = "server_error"
    code = "upstream_error"


class Preempted(ParamparaError):
    """The stage was asked to stop, wrote a checkpoint and stopped."""

    code = "preempted"
    exit_code = EXIT_PREEMPTED


class WorkdirBusy(ParamparaError):
    """Another process still works in the stage's directory; nothing was touched."""

    code = "workdir_busy"
    exit_code = EXIT_BUSY


class Diverged(ParamparaError):
    """Loss or gradients are no longer finite; nothing of it was kept."""

    code = "diverged"
    exit_code = EXIT_DIVERGED


class OutOfMemory(ParamparaError):
    code = "out_of_memory"
    exit_code = EXIT_OUT_OF_MEMORY


class ProcessDied(ParamparaError):
    """Of the processes that train together one was killed, crashed or lost the others; counts as a crash of the stage."""

    code = "process_died"


class DiskFull(ParamparaError):
    """No room left where the stage writes; nothing half-written counts, and what was whole before still is."""

    code = "disk_full"
    exit_code = EXIT_DISK_FULL


class ArtifactDamaged(ParamparaError):
    """Bytes in the store differ from the manifest."""

    code = "artifact_damaged"
