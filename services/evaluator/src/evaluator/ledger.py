"""The ledger of a line: its transitions, each compared as soon as both sides are recorded, and no recording kept longer than needed.

A recording of an 8B model takes gigabytes (64 probes of 100 tokens over a vocabulary of 128,256 are 3.3 GB), so at most three lie
on the disk at a time: the base, which every model is to differ from, the model before the last transition, and the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluator import parity
from evaluator.line import Member
from evaluator.meter import Meter
from parampara.errors import InvalidData
from parampara.schemas.metrics import last_merged


@dataclass(frozen=True)
class Transition:
    """From ``reference`` to ``candidate``; ``origin`` is the model before the adapter that the reference carries."""

    name: str
    reference: Member
    candidate: Member
    origin: Member | None = None


def transitions(line: Sequence[Member]) -> list[Transition]:
    """The transitions that this line has; the one into the final merged model is ``merged``, whichever adapter was the last."""
    by_name = {member.name: member for member in line}
    base, last = by_name["base"], by_name[last_merged(by_name)]
    before = by_name.get("dapt", base)
    found: list[Transition] = []
    if "dapt_adapter" in by_name:
        found.append(Transition("dapt", by_name["dapt_adapter"], by_name["dapt"], base))
    if "dpo_adapter" in by_name:
        if "sft_adapter" in by_name:
            found.append(Transition("sft", by_name["sft_adapter"], by_name["sft"], before))
        found.append(Transition("merged", by_name["dpo_adapter"], last, by_name["sft"]))
    elif "sft_adapter" in by_name:
        found.append(Transition("merged", by_name["sft_adapter"], last, before))
    elif adapted := by_name.get("dapt_adapter") or by_name.get("dapt"):
        found.append(Transition("merged", adapted, last, base))
    if "quantized" in by_name:
        found.append(Transition("quantized", last, by_name["quantized"]))
    return found


class Ledger:
    """Takes recordings in the order of the line; afterwards it knows how the sides of every transition agree."""

    def __init__(self, line: Sequence[Member], meter: Meter) -> None:
        pairs = []
        for step in transitions(line):
            pairs += [(step.reference.name, step.candidate.name), ("base", step.candidate.name)]
            if step.origin is not None:
                pairs.append((step.reference.name, step.origin.name))
        self._open = set(pairs)
        self._agreements: dict[tuple[str, str], parity.Agreement | None] = {}
        self._recordings: dict[str, parity.Recording] = {}
        self._meter = meter

    def add(self, recording: parity.Recording) -> None:
        """Compare it with the recordings that it is to be compared with, and delete those that no later one needs.

        Raises:
            Preempted: asked to stop.
        """
        self._recordings[recording.name] = recording
        for pair in sorted(pair for pair in self._open if set(pair) <= self._recordings.keys()):
            self._agreements[pair] = self._compared(*pair)
            self._open.remove(pair)
        needed = {name for pair in self._open for name in pair}
        for name in self._recordings.keys() - needed:
            self._recordings.pop(name).delete()

    def agreement(self, reference: str, candidate: str) -> parity.Agreement | None:
        """None if the two are not versions of one model: the missing metrics then fail their gates."""
        return self._agreements[reference, candidate]

    def _compared(self, reference: str, candidate: str) -> parity.Agreement | None:
        try:
            return parity.compare(self._recordings[reference], self._recordings[candidate], meter=self._meter)
        except InvalidData as error:
            self._meter.warn(error.message)
            return None
