"""The ways to eight bits. Each has ``write(model, output, ...)`` and raises :class:`SchemeUnavailable` when it cannot run here."""

from __future__ import annotations

from parampara.errors import ParamparaError, Preempted
from parampara.execution import stop


class SchemeUnavailable(ParamparaError):
    """This way cannot run on this machine or gave a checkpoint that is not good; the message is the reason, for the record."""

    code = "scheme_unavailable"


def check_stop() -> None:
    """Raise :class:`Preempted` if the stage was asked to stop."""
    if stop.requested():
        raise Preempted("Asked to stop during quantization; the next attempt starts this stage again.")
