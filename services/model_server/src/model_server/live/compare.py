"""Expected and served distributions side by side: plain arithmetic over numbers that were already fetched.

vLLM tells the likeliest tokens of a position, not all of the vocabulary, so the divergence here is a lower bound of the true one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parampara.errors import UpstreamFailed
from parampara.schemas.expectations import TOP_K, ExpectedProbe

_LEAST = 1e-9
"""Least probability of what is left over: both sides are rounded, and their sums reach one."""


@dataclass(frozen=True)
class Position:
    """What the server says about the token at one place of the prompt."""

    logprobs: Mapping[int, float]
    """Of its likeliest tokens and of the one that stands there, in nats."""
    best: int

    @property
    def floor(self) -> float:
        """What a token that is not told has at most."""
        return sorted(self.logprobs.values(), reverse=True)[:TOP_K][-1]


@dataclass(frozen=True)
class Sums:
    """Of all forced tokens of some probes, to be added up and divided once."""

    kl: float = 0.0
    same_top: int = 0
    expected_nats: float = 0.0
    live_nats: float = 0.0
    tokens: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def metrics(self) -> dict[str, float]:
        """``kl`` in nats per token, ``top1`` the share of tokens with one likeliest token, ``perplexity_change`` of the forced tokens
        as a fraction."""
        change = math.expm1(min((self.live_nats - self.expected_nats) / self.tokens, 700.0))
        return {"kl": self.kl / self.tokens, "top1": self.same_top / self.tokens, "perplexity_change": change}


def read_positions(prompt_logprobs: Sequence[Any], *, count: int) -> list[Position]:
    """The last ``count`` entries of vLLM's ``prompt_logprobs``: ``{"<token id>": {"logprob": ..., "rank": ...}}`` each.

    Raises:
        UpstreamFailed: the answer holds something else.
    """
    if len(prompt_logprobs) <= count:
        raise UpstreamFailed(f"prompt_logprobs has {len(prompt_logprobs)} entries for more than {count} tokens.", code="bad_logprobs")
    try:
        return [_position(entry) for entry in prompt_logprobs[-count:]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UpstreamFailed(f"prompt_logprobs is not a list of token ids with logprob and rank: {error!r}", code="bad_logprobs") from None


def compare(probe: ExpectedProbe, positions: Sequence[Position]) -> Sums:
    """Sums over the forced tokens of one probe.

    Raises:
        UpstreamFailed: the server left a forced token out.
    """
    total = Sums()
    told = zip(probe.forced_ids, probe.forced_logprobs, probe.top_ids, probe.top_logprobs, positions, strict=True)
    for forced, forced_logprob, top_ids, top_logprobs, live in told:
        if forced not in live.logprobs:
            raise UpstreamFailed(f"prompt_logprobs leaves out token {forced}, which stands in the prompt.", code="bad_logprobs")
        expected = {**dict(zip(top_ids, top_logprobs, strict=True)), forced: forced_logprob}
        total += Sums(
            kl=coarse_kl(expected, live.logprobs, floor=live.floor),
            same_top=int(top_ids[0] == live.best),
            expected_nats=-forced_logprob,
            live_nats=-live.logprobs[forced],
            tokens=1,
        )
    return total


def coarse_kl(expected: Mapping[int, float], live: Mapping[int, float], *, floor: float) -> float:
    """A lower bound of KL(expected || live) in nats from the likeliest tokens of each side.

    Tokens that both name stand alone; those that ``expected`` alone names are one class, of which ``live`` holds at most ``exp(floor)``
    each; the rest of the vocabulary is another. Merging outcomes never raises a divergence (the log sum inequality; Cover and
    Thomas, Elements of Information Theory, 2.7), and of what is not known about ``live`` the mildest is assumed.
    """
    both = expected.keys() & live.keys()
    kl = sum(math.exp(expected[token]) * (expected[token] - live[token]) for token in both)
    expected_only = sum(math.exp(logprob) for token, logprob in expected.items() if token not in both)
    live_only = sum(math.exp(logprob) for token, logprob in live.items() if token not in both)
    expected_rest = max(1 - sum(math.exp(expected[token]) for token in both) - expected_only, 0.0)
    left = max(1 - sum(math.exp(live[token]) for token in both), _LEAST)
    most = min((len(expected) - len(both)) * math.exp(floor), max(left - live_only, _LEAST))
    mildest = left * expected_only / (expected_only + expected_rest) if expected_only else 0.0
    hidden = min(most, mildest)
    return max(kl + _term(expected_only, hidden) + _term(expected_rest, left - hidden), 0.0)


def common_prefix(expected: Sequence[int], live: Sequence[int]) -> float:
    """Share of ``expected`` before the first token that differs; 1 for two empty answers."""
    if not expected:
        return float(not live)
    pairs = zip(expected, live, strict=False)
    return next((index for index, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(expected), len(live))) / len(expected)


def _term(p: float, q: float) -> float:
    return p * math.log(p / max(q, _LEAST)) if p > 0 else 0.0


def _position(entry: Mapping[str, Mapping[str, Any]]) -> Position:
    best = min(entry, key=lambda token: entry[token]["rank"])
    return Position({int(token): float(told["logprob"]) for token, told in entry.items()}, int(best))
