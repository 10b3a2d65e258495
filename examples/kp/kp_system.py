"""The Krishnamurti Paddhati (KP) system as computed facts: signs, stars, subs, significators, house groups, ruling planets.

Every length is a whole number of arcseconds, so no boundary is ever rounded: a star (nakshatra) is 13 deg 20 min = 48,000
arcseconds, and the sub of a lord with ``y`` Vimshottari years is ``48,000 * y / 120 = 400 * y`` arcseconds. Longitudes are
sidereal, counted from 0 deg Aries; a boundary belongs to the division that begins there. Positions between arcseconds may
be given as :class:`fractions.Fraction`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

Arcseconds = int | Fraction

DEGREE = 3600
CIRCLE = 360 * DEGREE
SIGN_LENGTH = 30 * DEGREE
STAR_LENGTH = 13 * DEGREE + 20 * 60
CYCLE_YEARS = 120

DASHA_YEARS: dict[str, int] = {
    "Ketu": 7, "Venus": 20, "Sun": 6, "Moon": 10, "Mars": 7, "Rahu": 18, "Jupiter": 16, "Saturn": 19, "Mercury": 17,
}  # fmt: skip
"""Vimshottari lords in their order, with their years; they sum to 120."""
LORDS = list(DASHA_YEARS)

SIGN_LORDS: dict[str, str] = {
    "Aries": "Mars", "Taurus": "Venus", "Gemini": "Mercury", "Cancer": "Moon", "Leo": "Sun", "Virgo": "Mercury",
    "Libra": "Venus", "Scorpio": "Mars", "Sagittarius": "Jupiter", "Capricorn": "Saturn", "Aquarius": "Saturn", "Pisces": "Jupiter",
}  # fmt: skip
SIGNS = list(SIGN_LORDS)

NAKSHATRAS = [
    "Ashwini", "Bharani", "Krittika", "Rohini", "Mrigashira", "Ardra", "Punarvasu", "Pushya", "Ashlesha",
    "Magha", "Purva Phalguni", "Uttara Phalguni", "Hasta", "Chitra", "Swati", "Vishakha", "Anuradha", "Jyeshtha",
    "Mula", "Purva Ashadha", "Uttara Ashadha", "Shravana", "Dhanishta", "Shatabhisha", "Purva Bhadrapada",
    "Uttara Bhadrapada", "Revati",
]  # fmt: skip
STAR_LORDS: dict[str, str] = {name: LORDS[index % 9] for index, name in enumerate(NAKSHATRAS)}

DAY_LORDS: dict[str, str] = {
    "Sunday": "Sun", "Monday": "Moon", "Tuesday": "Mars", "Wednesday": "Mercury", "Thursday": "Jupiter",
    "Friday": "Venus", "Saturday": "Saturn",
}  # fmt: skip

HOUSE_GROUPS: dict[str, tuple[int, ...]] = {
    "marriage": (2, 7, 11),
    "love marriage": (2, 5, 7, 11),
    "separation": (1, 6, 10),
    "career": (2, 6, 10, 11),
    "business": (2, 7, 10, 11),
    "wealth": (2, 6, 11),
    "childbirth": (2, 5, 11),
    "education": (4, 9, 11),
    "property": (4, 11, 12),
    "foreign travel": (3, 9, 12),
    "relocation": (3, 10, 12),
    "illness": (6, 8, 12),
    "recovery": (1, 5, 11),
    "litigation": (6, 11),
}
"""Houses that must be signified for a matter to come about. Teachers differ in detail; this is the set of this example."""

LEVELS: dict[int, str] = {
    1: "planet in the star of an occupant",
    2: "occupant of the house",
    3: "planet in the star of the house lord",
    4: "lord of the house",
}
"""The four levels of significators of a house, strongest first."""


@dataclass(frozen=True)
class Sub:
    """One of the 249 divisions of the zodiac; ``start`` and ``end`` in arcseconds, end excluded."""

    number: int
    start: int
    end: int
    sign: str
    star: str
    sign_lord: str
    star_lord: str
    sub_lord: str


@dataclass(frozen=True)
class Position:
    """What a longitude means in KP."""

    sign: str
    sign_lord: str
    star: str
    star_lord: str
    sub_lord: str
    sub_number: int


@dataclass(frozen=True)
class Chart:
    """A chart: longitudes of the planets and of the twelve house cusps (index 0 is the ascendant), in arcseconds."""

    planets: Mapping[str, Arcseconds]
    cusps: Sequence[Arcseconds]


def sub_length(lord: str) -> int:
    """Arcseconds of the sub of ``lord`` inside one star."""
    return STAR_LENGTH * DASHA_YEARS[lord] // CYCLE_YEARS


def lords_from(first: str) -> list[str]:
    """The nine lords in Vimshottari order, starting with ``first``."""
    start = LORDS.index(first)
    return LORDS[start:] + LORDS[:start]


def star_span(star: str) -> tuple[int, int]:
    """First arcsecond of a star and the first one after it."""
    start = NAKSHATRAS.index(star) * STAR_LENGTH
    return start, start + STAR_LENGTH


def all_subs() -> list[Sub]:
    """The 249 subs in zodiacal order: 27 x 9 = 243, and six of them are cut in two by a sign boundary."""
    return [
        Sub(number, start, end, SIGNS[start // SIGN_LENGTH], star, SIGN_LORDS[SIGNS[start // SIGN_LENGTH]], STAR_LORDS[star], lord)
        for number, (start, end, star, lord) in enumerate(_cut_subs(), 1)
    ]


def position(longitude: Arcseconds) -> Position:
    """Sign, star and sub of a longitude in arcseconds; any number of full turns is taken off."""
    place = longitude % CIRCLE
    sub = next(sub for sub in SUBS if sub.start <= place < sub.end)
    return Position(sub.sign, sub.sign_lord, sub.star, sub.star_lord, sub.sub_lord, sub.number)


def longitude(*, sign: str, degrees: int, minutes: int = 0, seconds: int = 0) -> int:
    """Arcseconds from 0 deg Aries of a place given inside a sign."""
    return SIGNS.index(sign) * SIGN_LENGTH + degrees * DEGREE + minutes * 60 + seconds


def house_of(place: Arcseconds, cusps: Sequence[Arcseconds]) -> int:
    """House (1 to 12) that holds ``place``: a house runs from its cusp to the next one.

    Raises:
        ValueError: not twelve cusps.
    """
    if len(cusps) != 12:
        raise ValueError(f"A chart has 12 cusps, got {len(cusps)}.")
    for index, cusp in enumerate(cusps):
        if (place - cusp) % CIRCLE < (cusps[(index + 1) % 12] - cusp) % CIRCLE:
            return index + 1
    raise ValueError("The cusps do not go once round the zodiac.")


def significators(chart: Chart, house: int) -> dict[int, list[str]]:
    """Planets that signify ``house``, by level (see :data:`LEVELS`), in the chart's own order of planets."""
    star_lord = {planet: position(place).star_lord for planet, place in chart.planets.items()}
    occupants = [planet for planet, place in chart.planets.items() if house_of(place, chart.cusps) == house]
    lord = position(chart.cusps[house - 1]).sign_lord
    return {
        1: [planet for planet in chart.planets if star_lord[planet] in occupants],
        2: occupants,
        3: [planet for planet in chart.planets if star_lord[planet] == lord],
        4: [lord],
    }


def ruling_planets(*, ascendant: Arcseconds, moon: Arcseconds, weekday: str) -> list[str]:
    """Ruling planets of a moment, strongest first and each once: ascendant's star and sign lord, Moon's star and sign lord, day lord."""
    rising, lunar = position(ascendant), position(moon)
    order = [rising.star_lord, rising.sign_lord, lunar.star_lord, lunar.sign_lord, DAY_LORDS[weekday]]
    return list(dict.fromkeys(order))


def dms(arcseconds: int) -> str:
    """Arcseconds as ``13°20'`` or, where seconds remain, ``2°13'20"``."""
    degrees, rest = divmod(arcseconds, DEGREE)
    minutes, seconds = divmod(rest, 60)
    return f"{degrees}°{minutes:02d}'" + (f'{seconds:02d}"' if seconds else "")


def _cut_subs() -> Iterator[tuple[int, int, str, str]]:
    for star in NAKSHATRAS:
        start = star_span(star)[0]
        for lord in lords_from(STAR_LORDS[star]):
            end = start + sub_length(lord)
            boundary = (start // SIGN_LENGTH + 1) * SIGN_LENGTH
            if start < boundary < end:
                yield start, boundary, star, lord
                start = boundary
            yield start, end, star, lord
            start = end


SUBS = all_subs()
