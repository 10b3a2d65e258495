"""The KP system against figures that every KP table prints."""

from __future__ import annotations

from fractions import Fraction

import kp_system as kp
import pytest


def test_there_are_249_subs_that_fill_the_circle_without_gap():
    assert len(kp.SUBS) == 249
    assert [sub.number for sub in kp.SUBS] == list(range(1, 250))
    assert kp.SUBS[0].start == 0
    assert kp.SUBS[-1].end == kp.CIRCLE == 360 * 3600
    assert all(left.end == right.start for left, right in zip(kp.SUBS, kp.SUBS[1:], strict=False))
    assert all(sub.start < sub.end for sub in kp.SUBS)


def test_no_sub_crosses_a_sign_or_a_star():
    for sub in kp.SUBS:
        assert sub.start // kp.SIGN_LENGTH == (sub.end - 1) // kp.SIGN_LENGTH
        assert sub.start // kp.STAR_LENGTH == (sub.end - 1) // kp.STAR_LENGTH


def test_six_subs_are_cut_by_a_sign_boundary():
    cut = [
        (left.number, left.sign, left.star, left.sub_lord)
        for left, right in zip(kp.SUBS, kp.SUBS[1:], strict=False)
        if (left.star, left.sub_lord) == (right.star, right.sub_lord)
    ]
    assert cut == [
        (22, "Aries", "Krittika", "Rahu"), (62, "Gemini", "Punarvasu", "Moon"), (105, "Leo", "Uttara Phalguni", "Rahu"),
        (145, "Libra", "Vishakha", "Moon"), (188, "Sagittarius", "Uttara Ashadha", "Rahu"), (228, "Aquarius", "Purva Bhadrapada", "Moon"),
    ]  # fmt: skip


def test_vimshottari_years_and_subs_sum_up():
    assert sum(kp.DASHA_YEARS.values()) == kp.CYCLE_YEARS == 120
    assert sum(kp.sub_length(lord) for lord in kp.LORDS) == kp.STAR_LENGTH
    assert kp.STAR_LENGTH * 27 == kp.CIRCLE
    assert all(kp.STAR_LENGTH * years % kp.CYCLE_YEARS == 0 for years in kp.DASHA_YEARS.values())
    for star in kp.NAKSHATRAS:
        start, end = kp.star_span(star)
        assert sum(sub.end - sub.start for sub in kp.SUBS if start <= sub.start < end) == kp.STAR_LENGTH


@pytest.mark.parametrize(
    ("lord", "length"),
    [("Ketu", "0°46'40\""), ("Venus", "2°13'20\""), ("Sun", "0°40'"), ("Moon", "1°06'40\""), ("Mars", "0°46'40\""), ("Rahu", "2°00'"),
     ("Jupiter", "1°46'40\""), ("Saturn", "2°06'40\""), ("Mercury", "1°53'20\"")],
)  # fmt: skip
def test_length_of_a_sub(lord, length):
    assert kp.dms(kp.sub_length(lord)) == length


def test_stars_repeat_their_lords_every_nine():
    assert len(kp.NAKSHATRAS) == len(set(kp.NAKSHATRAS)) == 27
    assert [kp.STAR_LORDS[star] for star in ("Ashwini", "Magha", "Mula")] == ["Ketu"] * 3
    assert [kp.STAR_LORDS[star] for star in ("Rohini", "Hasta", "Shravana")] == ["Moon"] * 3
    assert kp.STAR_LORDS["Revati"] == "Mercury"


@pytest.mark.parametrize(
    ("place", "sign_lord", "star", "star_lord", "sub_lord", "number"),
    [
        (0, "Mars", "Ashwini", "Ketu", "Ketu", 1),
        (kp.longitude(sign="Aries", degrees=0, minutes=46, seconds=40), "Mars", "Ashwini", "Ketu", "Venus", 2),
        (kp.longitude(sign="Aries", degrees=13, minutes=20) - 1, "Mars", "Ashwini", "Ketu", "Mercury", 9),
        (kp.longitude(sign="Aries", degrees=13, minutes=20), "Mars", "Bharani", "Venus", "Venus", 10),
        (kp.longitude(sign="Taurus", degrees=0), "Venus", "Krittika", "Sun", "Rahu", 23),
        (kp.longitude(sign="Leo", degrees=5), "Sun", "Magha", "Ketu", "Mars", 88),
        (kp.CIRCLE - 1, "Jupiter", "Revati", "Mercury", "Saturn", 249),
        (kp.CIRCLE, "Mars", "Ashwini", "Ketu", "Ketu", 1),
        (Fraction(kp.STAR_LENGTH) - Fraction(1, 1000), "Mars", "Ashwini", "Ketu", "Mercury", 9),
    ],
)
def test_position(place, sign_lord, star, star_lord, sub_lord, number):
    found = kp.position(place)
    assert (found.sign_lord, found.star, found.star_lord, found.sub_lord, found.sub_number) == (
        sign_lord,
        star,
        star_lord,
        sub_lord,
        number,
    )


def test_each_sign_has_its_known_number_of_subs():
    counts = {sign: sum(sub.sign == sign for sub in kp.SUBS) for sign in kp.SIGNS}
    assert [counts[sign] for sign in ("Aries", "Leo", "Sagittarius")] == [22] * 3
    assert [counts[sign] for sign in ("Taurus", "Virgo", "Capricorn")] == [19] * 3
    assert sum(counts.values()) == 249


EQUAL_CUSPS = [index * kp.SIGN_LENGTH for index in range(12)]


def test_four_levels_of_significators():
    """The worked example of the fourth book: seventh cusp in Aries with Jupiter in it, stars of Jupiter and of Mars occupied."""
    seventh = kp.longitude(sign="Aries", degrees=3)
    cusps = [(seventh + (house - 7) * kp.SIGN_LENGTH) % kp.CIRCLE for house in range(1, 13)]
    planets = {
        "Sun": kp.star_span("Punarvasu")[0] + 60,
        "Saturn": kp.star_span("Vishakha")[0] + 60,
        "Jupiter": kp.longitude(sign="Aries", degrees=15),
        "Moon": kp.star_span("Chitra")[0] + 60,
        "Mars": kp.longitude(sign="Leo", degrees=1),
    }
    assert kp.significators(kp.Chart(planets, cusps), 7) == {1: ["Sun", "Saturn"], 2: ["Jupiter"], 3: ["Moon"], 4: ["Mars"]}


def test_vacant_house_has_no_first_and_second_level():
    chart = kp.Chart({"Mercury": kp.star_span("Anuradha")[0]}, EQUAL_CUSPS)
    assert kp.significators(chart, 10) == {1: [], 2: [], 3: ["Mercury"], 4: ["Saturn"]}


def test_house_begins_at_its_cusp_and_wraps_round_the_circle():
    cusps = [(kp.longitude(sign="Pisces", degrees=20) + index * kp.SIGN_LENGTH) % kp.CIRCLE for index in range(12)]
    assert kp.house_of(cusps[0], cusps) == 1
    assert kp.house_of(kp.longitude(sign="Aries", degrees=5), cusps) == 1
    assert kp.house_of(cusps[0] - 1, cusps) == 12
    with pytest.raises(ValueError, match="12 cusps"):
        kp.house_of(0, cusps[:11])


def test_ruling_planets_strongest_first_each_once():
    """The example of the fifth book."""
    found = kp.ruling_planets(
        ascendant=kp.longitude(sign="Leo", degrees=12), moon=kp.longitude(sign="Taurus", degrees=15), weekday="Tuesday"
    )
    assert found == ["Ketu", "Sun", "Moon", "Venus", "Mars"]
    same = kp.ruling_planets(ascendant=0, moon=0, weekday="Tuesday")
    assert same == ["Ketu", "Mars"]


def test_house_groups():
    assert kp.HOUSE_GROUPS["marriage"] == (2, 7, 11)
    assert kp.HOUSE_GROUPS["career"] == (2, 6, 10, 11)
    assert all(list(houses) == sorted(set(houses)) and set(houses) <= set(range(1, 13)) for houses in kp.HOUSE_GROUPS.values())
