"""Facts of KP as question and answer: for every kind its facts, computed by ``kp_system``, and its ways of asking.

A fact and a way of asking together make one question. Answers have three lines, ``Answer:``, ``Rule:`` and ``Confidence:``;
a Hinglish question (Hindi and English mixed, in Latin script) gets its rule in Hinglish. Kinds about charts: ``chart_questions``.
"""

from __future__ import annotations

from collections.abc import Iterator

import chart_questions as charts
import kp_system as kp
from facts import Fact, Kind, Language, same_answer

RULING_ORDER = ["ascendant star lord", "ascendant sign lord", "Moon star lord", "Moon sign lord", "day lord"]
ORDINALS = ["first", "second", "third", "fourth", "fifth"]
LEAD_INS: dict[Language, tuple[str, ...]] = {
    "english": ("In KP astrology: ", "A quick question. "),
    "hinglish": ("KP mein: ", "Ek chhota sawaal. "),
}
"""Openings that double and treble the questions of kinds with few facts, so that these are met as often as the others."""
FEW_FACTS = 15
SIGN_OWNERS = [lord for lord in kp.LORDS if lord in kp.SIGN_LORDS.values()]
NOT_COVERED = ["gemstone", "lucky colour", "lucky number", "mantra", "metal", "flower"]


def _named(planet: str) -> str:
    return f"the {planet}" if planet in ("Sun", "Moon") else planet


def _sign_lord() -> Iterator[Fact]:
    for sign, lord in kp.SIGN_LORDS.items():
        yield same_answer(
            "sign_lord", {"e": sign}, lord, f"{sign} is ruled by {lord}.", f"{sign} ka sign lord {lord} hai.",
            evidence=f"{sign} is ruled by {_named(lord)}.",
        )  # fmt: skip


def _lord_signs() -> Iterator[Fact]:
    for lord in kp.LORDS:
        signs = [sign for sign, owner in kp.SIGN_LORDS.items() if owner == lord]
        if signs:
            yield same_answer(
                "lord_signs",
                {"e": lord},
                ", ".join(signs),
                f"{lord} owns {' and '.join(signs)}.",
                f"{lord} {' aur '.join(signs)} ka lord hai.",
            )


def _star_lord() -> Iterator[Fact]:
    for star, lord in kp.STAR_LORDS.items():
        stars = [name for name, owner in kp.STAR_LORDS.items() if owner == lord]
        yield same_answer(
            "star_lord", {"e": star}, lord, f"{star} is a star of {lord}.", f"{star} ka star lord {lord} hai.",
            evidence=f"The stars of {_named(lord)} are {stars[0]}, {stars[1]} and {stars[2]}.",
        )  # fmt: skip


def _lord_stars() -> Iterator[Fact]:
    for lord in kp.LORDS:
        stars = [name for name, owner in kp.STAR_LORDS.items() if owner == lord]
        yield same_answer(
            "lord_stars", {"e": lord}, ", ".join(stars), f"Each lord owns three stars, and these belong to {lord}.",
            f"Har lord ke teen star hain, yeh {lord} ke hain.",
            evidence=f"The stars of {_named(lord)} are {stars[0]}, {stars[1]} and {stars[2]}.",
        )  # fmt: skip


def _dasha_years() -> Iterator[Fact]:
    for lord, years in kp.DASHA_YEARS.items():
        yield Fact(
            "dasha_years",
            {"e": lord},
            {"english": f"{years} years", "hinglish": f"{years} saal"},
            {"english": f"{lord} has {years} of 120 years.", "hinglish": f"120 saal mein {lord} ke {years} saal hain."},
            evidence=f"The period of {_named(lord)} lasts {years} years",
        )


def _next_lord() -> Iterator[Fact]:
    for index, lord in enumerate(kp.LORDS):
        after = kp.LORDS[(index + 1) % 9]
        yield same_answer(
            "next_lord", {"e": lord}, after, f"In the Vimshottari order {after} follows {lord}.",
            f"Vimshottari kram mein {lord} ke baad {after} hai.", evidence=f"After {_named(lord)} comes {_named(after)}",
        )  # fmt: skip


def _nakshatra_span() -> Iterator[Fact]:
    for star in kp.NAKSHATRAS:
        start, end = kp.star_span(star)
        first, last = _in_sign(start), _in_sign(end, end=True)
        yield Fact(
            "nakshatra_span",
            {"e": star},
            {"english": f"{first} to {last}", "hinglish": f"{first} se {last} tak"},
            {"english": "A nakshatra is 13°20' long.", "hinglish": "Ek nakshatra 13°20' ka hota hai."},
            evidence=f"from {first} to {last}",
        )


def _nakshatra_number() -> Iterator[Fact]:
    for number, star in enumerate(kp.NAKSHATRAS, 1):
        yield same_answer(
            "nakshatra_number", {"e": star}, str(number), f"{star} is number {number} of 27.", f"27 mein {star} ka number {number} hai.",
            evidence=f"{number}. {star}.",
        )  # fmt: skip


def _sub_length() -> Iterator[Fact]:
    for lord in kp.LORDS:
        years = kp.DASHA_YEARS[lord]
        yield same_answer(
            "sub_length",
            {"e": lord},
            kp.dms(kp.sub_length(lord)),
            f"13°20' times {years} years by 120.",
            f"Yeh 13°20' ka {years}/120 hissa hai.",
        )


def _sub_count() -> Iterator[Fact]:
    for sign in kp.SIGNS:
        count = sum(sub.sign == sign for sub in kp.SUBS)
        yield same_answer(
            "sub_count", {"e": sign}, str(count), f"{sign} holds {count} of 249 subs.", f"249 mein se {count} sub {sign} mein hain."
        )
    yield same_answer(
        "sub_count", {"e": "the zodiac"}, str(len(kp.SUBS)), "27 times 9 is 243, and six subs are cut.",
        "27 guna 9 yaani 243, aur chhe sub kate hain.", evidence="So the zodiac has 243 and six, which is 249 subs.",
        hinglish_words={"e": "rashichakra"},
    )  # fmt: skip


def _house_group() -> Iterator[Fact]:
    for matter, houses in kp.HOUSE_GROUPS.items():
        listed = ", ".join(map(str, houses[:-1])) + f" and {houses[-1]}"
        yield same_answer(
            "house_group", {"e": matter}, ", ".join(map(str, houses)), f"Judge {matter} from its house group.",
            f"{matter.capitalize()} ke liye yeh house group dekhte hain.", confidence="Medium",
            evidence=f"{matter.capitalize()} is judged from houses {listed}.",
        )  # fmt: skip


def _significator_level() -> Iterator[Fact]:
    english = ["is in the star of an occupant of", "occupies", "is in the star of the lord of", "is the lord of"]
    hinglish = ["ke occupant ke star mein", "ke andar", "ke lord ke star mein", "ka lord"]
    evidence = [
        "in the star of an occupant of the house is a significator of the first", "that occupies the house is a significator of the second",
        "in the star of the lord of the house is a significator of the third", "The lord of the house is a significator of the fourth",
    ]  # fmt: skip
    for house in range(1, 13):
        for level, phrase in kp.LEVELS.items():
            able = SIGN_OWNERS if level == 4 else kp.LORDS  # Rahu and Ketu own no sign, so they are the lord of no house
            planet = able[(house * 4 + level * 2) % len(able)]
            words = {"e": planet, "h": str(house), "rel": english[level - 1], "sambandh": hinglish[level - 1]}
            yield same_answer(
                "significator_level", words, f"Level {level}", f"Level {level} is the {phrase}.",
                f"Level {level} ka grah house {hinglish[level - 1]} hota hai.", evidence=evidence[level - 1],
            )  # fmt: skip


def _day_lord() -> Iterator[Fact]:
    for day, lord in kp.DAY_LORDS.items():
        yield same_answer(
            "day_lord", {"e": day}, lord, f"{lord} is the lord of {day}.", f"{day} ka lord {lord} hai.",
            evidence=f"{_named(lord)} is the lord of {day}.".replace("the ", "The ", 1) if lord in ("Sun", "Moon") else f"{lord} is the lord of {day}.",
        )  # fmt: skip


def _ruling_planets() -> Iterator[Fact]:
    for rank, (ordinal, planet) in enumerate(zip(ORDINALS, RULING_ORDER, strict=True), 1):
        yield same_answer(
            "ruling_planets", {"e": ordinal, "n": str(rank)}, planet, f"Number {rank} of five ruling planets.", f"Paanch ruling planets mein yeh number {rank} hai.",
            confidence="Medium", evidence="The star lord of the ascendant is the strongest and the day lord is the weakest.",
        )  # fmt: skip


def _not_covered() -> Iterator[Fact]:
    for index, sign in enumerate(kp.SIGNS):
        for thing in (NOT_COVERED[index % 6], NOT_COVERED[(index + 2) % 6]):
            yield Fact(
                "not_covered", {"e": sign, "thing": thing}, {"english": "Not in the passages", "hinglish": "Passages mein nahi hai"},
                {"english": f"No passage names a {thing}.", "hinglish": f"Kisi passage mein {thing} nahi likha hai."}, confidence="Low",
            )  # fmt: skip


def _in_sign(place: int, *, end: bool = False) -> str:
    """``26°40' Aries``; an end that lies on a boundary belongs to the sign before it."""
    sign = (place - 1 if end else place) // kp.SIGN_LENGTH
    return f"{kp.dms(place - sign * kp.SIGN_LENGTH)} {kp.SIGNS[sign]}"


KINDS: dict[str, Kind] = {
    "sign_lord": Kind("signs", _sign_lord, [
        "Who is the lord of {e}?", "Which planet rules {e}?", "Name the sign lord of {e}.", "{e} is owned by which planet?",
        "Tell me the ruler of the sign {e}.", "In KP, which planet is the sign lord of {e}?",
    ], [
        "{e} rashi ka swami kaun hai?", "{e} ka sign lord batao.", "{e} rashi kis grah ki hai?", "Mujhe {e} ka rashi swami bataiye.",
    ]),
    "lord_signs": Kind("signs", _lord_signs, [
        "Which signs does {e} own?", "Name the signs ruled by {e}.", "{e} is the lord of which signs?", "List the signs of {e}.",
        "Over which signs does {e} rule?", "What are the own signs of {e}?",
    ], [
        "{e} kaun si rashi ka swami hai?", "{e} ki rashiyan batao.", "{e} ke sign kaun se hain?", "Kaun si rashi {e} ki hai?",
    ]),
    "star_lord": Kind("stars", _star_lord, [
        "Who is the star lord of {e}?", "Which planet rules the nakshatra {e}?", "Name the lord of {e} nakshatra.", "{e} is a star of which planet?",
        "Tell me the nakshatra lord of {e}.", "In KP, who owns the star {e}?",
    ], [
        "{e} nakshatra ka swami kaun hai?", "{e} ka star lord kaun hai?", "{e} kis grah ka nakshatra hai?", "Mujhe {e} ka nakshatra swami batao.",
    ]),
    "lord_stars": Kind("stars", _lord_stars, [
        "Which stars belong to {e}?", "Name the three nakshatras of {e}.", "{e} is the star lord of which nakshatras?", "List the stars of {e}.",
        "Which nakshatras does {e} rule?", "What are the three stars of {e}?",
    ], [
        "{e} ke teen nakshatra kaun se hain?", "{e} ke star batao.", "Kaun se nakshatra {e} ke hain?", "{e} kin nakshatron ka swami hai?",
    ]),
    "dasha_years": Kind("dasha", _dasha_years, [
        "How many years is the dasha of {e}?", "How long does the {e} dasha last?", "What is the length of the {e} mahadasha?",
        "Give the Vimshottari years of {e}.", "For how many years does {e} rule as dasha lord?", "Years of {e} in Vimshottari dasha?",
    ], [
        "{e} ki dasha kitne saal ki hoti hai?", "{e} mahadasha kitne saal chalti hai?", "Vimshottari mein {e} ke kitne saal hain?",
        "{e} dasha ki avadhi batao.",
    ]),
    "next_lord": Kind("dasha", _next_lord, [
        "Which dasha comes after {e}?", "Who follows {e} in the Vimshottari order?", "After the dasha of {e}, whose dasha begins?",
        "Name the next dasha lord after {e}.", "Which lord is next after {e}?", "What dasha starts when {e} ends?",
    ], [
        "{e} ke baad kiski dasha aati hai?", "{e} dasha ke baad kaun sa grah?", "Vimshottari mein {e} ke baad kaun hai?", "{e} ke baad ki dasha batao.",
    ]),
    "nakshatra_span": Kind("stars", _nakshatra_span, [
        "From which degree to which degree does {e} extend?", "What are the degrees of {e}?", "Give the span of {e} nakshatra.",
        "Where does {e} begin and end?", "Which part of the zodiac is {e}?", "State the limits of the star {e}.",
    ], [
        "{e} kahan se kahan tak hai?", "{e} nakshatra ke degree batao.", "{e} kitne degree se kitne degree tak hai?", "{e} ki seema kya hai?",
    ]),
    "nakshatra_number": Kind("stars", _nakshatra_number, [
        "Which number is {e} among the nakshatras?", "What is the number of {e}?", "{e} is which star in order?", "Give the serial number of {e}.",
        "At what position is {e} in the list of stars?", "Count the nakshatras: which one is {e}?",
    ], [
        "{e} kaun se number ka nakshatra hai?", "{e} ka number kya hai?", "27 mein {e} kis number par hai?", "{e} ka kram batao.",
    ]),
    "sub_length": Kind("subs", _sub_length, [
        "How long is the sub of {e}?", "What is the length of the {e} sub?", "Give the size of the sub of {e}.", "How many degrees is a {e} sub?",
        "What arc does the sub of {e} cover?", "State the measure of the {e} sub.",
    ], [
        "{e} ka sub kitna bada hai?", "{e} sub ki lambai batao.", "{e} ka sub kitne degree ka hai?", "{e} ke sub ka maap kya hai?",
    ]),
    "sub_count": Kind("subs", _sub_count, [
        "How many subs are in {e}?", "What is the number of subs in {e}?", "Give the count of subs for {e}.", "{e} has how many subs?",
        "Count the subs of {e}.", "Into how many subs is {e} divided?",
    ], [
        "{e} mein kitne sub hain?", "{e} ke sub kitne hain?", "{e} mein sub ki ginti batao.", "{e} kitne sub mein banta hai?",
    ]),
    "house_group": Kind("houses", _house_group, [
        "Which houses are judged for {e}?", "What is the house group for {e}?", "Name the houses of {e}.", "For {e}, which houses should be signified?",
        "Which houses show {e} in KP?", "What houses must I see for {e}?",
    ], [
        "{e} ke liye kaun se house dekhte hain?", "{e} ka house group batao.", "KP mein {e} kaun se bhaav se dekhein?", "{e} ke bhaav kaun se hain?",
    ]),
    "significator_level": Kind("significators", _significator_level, [
        "{e} {rel} house {h}. Which level of significator is it?", "What is the significator level of {e} if it {rel} house {h}?",
        "If {e} {rel} house {h}, at which level does it signify that house?", "{e} {rel} house {h}: name its level.",
    ], [
        "{e} house {h} {sambandh} hai. Kaun se level ka significator hai?", "Agar {e} house {h} {sambandh} ho, to level kya hai?",
    ]),
    "day_lord": Kind("ruling planets", _day_lord, [
        "Who is the day lord on {e}?", "Which planet rules {e}?", "Name the lord of {e}.", "On {e}, which planet is the day lord?",
        "Which ruling planet belongs to the day {e}?", "{e} is the day of which planet?",
    ], [
        "{e} ka lord kaun hai?", "{e} ka day lord batao.", "{e} kis grah ka din hai?", "{e} ko day lord kaun hota hai?",
    ]),
    "ruling_planets": Kind("ruling planets", _ruling_planets, [
        "Which is the {e} ruling planet in order of strength?", "Name the {e} of the five ruling planets.", "What comes {e} among the ruling planets?",
        "In the list of ruling planets, what is number {n}?", "Which ruling planet stands {e}?", "Give ruling planet number {n}.",
    ], [
        "Ruling planets mein number {n} kya hai?", "Ruling planet number {n} batao.", "Number {n} ruling planet kaun sa hai?",
        "Shakti ke kram mein ruling planet {n} kaun hai?",
    ]),
    **charts.KINDS,
    "not_covered": Kind("outside", _not_covered, [
        "What is the {thing} of {e}?", "Which {thing} belongs to {e}?", "Name the {thing} for {e}.",
    ], [
        "{e} ka {thing} kya hai?", "{e} ke liye {thing} batao.",
    ]),
}  # fmt: skip
"""Every kind with its topic, its facts and its phrasings; ``not_covered`` is asked only with passages."""
