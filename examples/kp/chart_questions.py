"""Questions about charts: places, moments and small charts are drawn from a seed, every answer is computed by ``kp_system``.

A chart of these questions has equal houses of 30 degrees from the ascendant and only the planets that the question names.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import kp_system as kp
from facts import Fact, Kind, same_answer

CHARTS_SEED = 20260102
PLACES = MOMENTS = CHARTS = 12
"""How many of each are asked about: few, so that a tiny model meets each of them often."""
FREE_PLANETS = ["Sun", "Moon", "Mars", "Jupiter", "Saturn", "Rahu"]
"""Planets that may stand at any distance from each other: Mercury and Venus keep near the Sun, Ketu stands opposite Rahu."""


def places() -> list[int]:
    """Longitudes in arcseconds, whole arcminutes, one in each sign."""
    rng = random.Random(f"{CHARTS_SEED}:places")
    return [index * kp.SIGN_LENGTH + 60 * rng.randrange(30 * 60) for index in range(PLACES)]


def moments() -> list[tuple[int, int, str]]:
    """Ascendant, Moon and weekday; no two with the same pair of stars."""
    rng = random.Random(f"{CHARTS_SEED}:moments")
    ascendants, moons = (rng.sample(range(27), MOMENTS) for _ in range(2))
    days = list(kp.DAY_LORDS)
    return [(_within(rising, rng), _within(lunar, rng), rng.choice(days)) for rising, lunar in zip(ascendants, moons, strict=True)]


def charts() -> list[tuple[kp.Chart, int]]:
    """Small charts, each with the house that is asked about: one that a planet occupies."""
    rng = random.Random(f"{CHARTS_SEED}:charts")
    found = []
    for rising in rng.sample(range(12), CHARTS):
        first = rising * kp.SIGN_LENGTH + kp.DEGREE * rng.randrange(30)
        cusps = [(first + index * kp.SIGN_LENGTH) % kp.CIRCLE for index in range(12)]
        planets = {name: _within(rng.randrange(27), rng) for name in rng.sample(FREE_PLANETS, 3)}
        found.append((kp.Chart(planets, cusps), kp.house_of(rng.choice(list(planets.values())), cusps)))
    return found


def _within(star: int, rng: random.Random) -> int:
    """A whole degree in the star of this index."""
    start = star * kp.STAR_LENGTH
    return kp.DEGREE * rng.randrange(-(-start // kp.DEGREE), (start + kp.STAR_LENGTH) // kp.DEGREE)


def _place(longitude: int) -> str:
    """``14°05' Leo``."""
    return f"{kp.dms(longitude % kp.SIGN_LENGTH)} {kp.position(longitude).sign}"


def _chart_position() -> Iterator[Fact]:
    for longitude in places():
        found = kp.position(longitude)
        lords = f"{found.sign_lord}, {found.star_lord}, {found.sub_lord}"
        yield same_answer(
            "chart_position",
            {"p": _place(longitude)},
            lords,
            f"{_place(longitude)} lies in {found.star} and is sub {found.sub_number}.",
            f"{_place(longitude)} {found.star} mein hai aur sub {found.sub_number} hai.",
        )


def _chart_ruling_planets() -> Iterator[Fact]:
    for ascendant, moon, day in moments():
        words = {"a": _place(ascendant), "m": _place(moon), "d": day}
        rising, lunar = kp.position(ascendant).star, kp.position(moon).star
        yield same_answer(
            "chart_ruling_planets",
            words,
            ", ".join(kp.ruling_planets(ascendant=ascendant, moon=moon, weekday=day)),
            f"The ascendant is in {rising}, the Moon in {lunar}.",
            f"Ascendant {rising} mein hai aur Moon {lunar} mein.",
        )


def _chart_significators() -> Iterator[Fact]:
    for chart, house in charts():
        levels = kp.significators(chart, house)
        listed = ", ".join(f"{name} {_place(int(place))}" for name, place in chart.planets.items())
        strongest_first = dict.fromkeys(planet for level in sorted(levels) for planet in levels[level])
        occupants = " and ".join(levels[2])
        yield same_answer(
            "chart_significators",
            {"a": _place(int(chart.cusps[0])), "l": listed, "h": str(house)},
            ", ".join(strongest_first),
            f"House {house} holds {occupants}, its lord is {levels[4][0]}.",
            f"House {house} mein {occupants.replace(' and ', ' aur ')} hai, lord {levels[4][0]} hai.",
            confidence="Medium",
        )


KINDS: dict[str, Kind] = {
    "chart_position": Kind("charts", _chart_position, [
        "What are the sign lord, star lord and sub lord of {p}?", "Name the three lords of {p}.", "A planet stands at {p}. Which lords does it have?",
    ], [
        "{p} ka sign lord, star lord aur sub lord batao.", "{p} ke teen lord kaun hain?",
    ]),
    "chart_ruling_planets": Kind("charts", _chart_ruling_planets, [
        "Ascendant {a}, Moon {m}, {d}. Which are the ruling planets?", "List the ruling planets for ascendant {a} and Moon {m} on a {d}.",
        "It is {d}, the ascendant is {a} and the Moon {m}. Name the ruling planets.",
    ], [
        "Ascendant {a}, Moon {m}, {d}. Ruling planets kaun se hain?", "{d} ko ascendant {a} aur Moon {m} hai, ruling planets batao.",
    ]),
    "chart_significators": Kind("charts", _chart_significators, [
        "Equal houses from ascendant {a}: {l}. Who signifies house {h}?", "Ascendant {a}, equal houses, {l}. List the significators of house {h}.",
        "With {l} and equal houses from {a}, which planets signify house {h}?",
    ], [
        "Ascendant {a}, equal houses, {l}. House {h} ke significator kaun hain?", "Equal houses {a} se, {l}. House {h} ke significator batao.",
    ]),
}  # fmt: skip
