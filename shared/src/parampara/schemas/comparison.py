"""What an evaluation stores of each held-out question, and how two models compare on the questions that both were asked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from parampara.schemas.stages import Strict


class Judgement(Strict):
    """What a judge said about one answer: a score, or why there is none."""

    score: Annotated[float, Field(ge=0, le=1)] | None = None
    reason: str = ""
    """In the judge's words."""
    error: str = ""
    """Why the answer was not judged."""


class ItemAnswer(Strict):
    answer: str
    exact: bool
    loss: float | None = None
    """Mean negative log-likelihood of the reference answer, nats per token; None where the question alone fills the window."""
    judgement: Annotated[Judgement | None, Field(exclude_if=lambda told: told is None)] = None
    """None where no judge was asked about it; then it is not written."""


class Item(Strict):
    """A line of ``items.jsonl``."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """sha256 of the conversation without its system message: the same question in another run has the same id."""
    question: str
    kind: str = ""
    language: str = ""
    expected: str
    models: dict[str, ItemAnswer]
    """Model name, one of :data:`parampara.schemas.metrics.MODELS`, to what it did."""


class Interval(Strict):
    """A mean difference, candidate minus champion, with the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Flip(Strict):
    """A question that one model answers exactly and the other does not."""

    id: str
    question: str
    expected: str
    champion: str
    candidate: str
    to: Literal["won", "lost"]


class Comparison(Strict):
    """The new model (candidate) against the one that serves (champion)."""

    items: Annotated[int, Field(ge=1)]
    """Questions that both were asked."""
    won: int
    lost: int
    exact: Interval
    """Difference of the exact-answer rates."""
    loss: Interval | None = None
    """Difference of the mean losses of the reference answers: below zero the candidate is better."""
    flips: list[Flip] = []

    def metrics(self) -> dict[str, float]:
        """The figures by the names that gates use."""
        told = {"items": float(self.items), "won": float(self.won), "lost": float(self.lost)}
        for name, interval in {"exact": self.exact, "loss": self.loss}.items():
            if interval is not None:
                told |= {f"{name}_difference": interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
        return {f"comparison.{name}": value for name, value in told.items()}
