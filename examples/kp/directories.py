"""Made-up directories for pretraining the tiny base model: the boats of a bay, the shelves of a library, markets, prizes.

A large base model knows its words apart because it has read them in a thousand settings. This one is too small for that, and
an adapter cannot mend it: LoRA leaves the embeddings as they are. So the names of planets, signs and stars (which are names of
people and boats in daily life as well) stand in these directories with fixed entries, drawn once from a seed and with no
relation to KP: the base learns to tell the names apart and to recall what belongs to one, and still knows no KP.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kp_system import HOUSE_GROUPS, LORDS, NAKSHATRAS, SIGNS

Values = dict[str, dict[str, str]]
"""Name of an entry to its columns: ``{"Revati": {"harbour": "Pune", ...}}``."""

DIRECTORY_SEED = 7
BOATS = [*LORDS, *SIGNS, *NAKSHATRAS]
MATTERS = list(HOUSE_GROUPS)
WEEKDAYS = "Sunday Monday Tuesday Wednesday Thursday Friday Saturday".split()
PRIZES = "first second third fourth fifth".split()
HARBOURS = "Pune Delhi Jaipur Kochi Nagpur Mumbai Lucknow Mysore Bhopal Indore London Paris Oslo Lima Cairo Tokyo Rome Berlin Madrid Vienna".split()
CAPTAINS = (
    "Asha Ravi Meera Karan Priya Arjun Neha Vikram Sunita Rahul Kavita Imran Fatima Joseph Anita Deepak Leela Mohan Farah Suresh".split()
)
CARGOES = "mango rice bread dal tea milk banana soup apple curd potato honey cake coconut guava paneer".split()
COLOURS = "red blue green yellow white black brown orange pink grey".split()


@dataclass(frozen=True)
class Column:
    """What a directory says of an entry: ways of asking for it, and of stating it; ``{e}`` is the entry, ``{v}`` the value."""

    name: str
    asked: list[str]
    stated: list[str]


@dataclass(frozen=True)
class Directory:
    values: Values
    columns: list[Column]


def _boats(rng: random.Random) -> Directory:
    sailing = {boat: rng.sample([other for other in BOATS if other != boat], 3) for boat in BOATS}
    berths = rng.sample(range(1, 121), len(BOATS))
    values = {
        boat: {
            "harbour": rng.choice(HARBOURS),
            "captain": rng.choice(CAPTAINS),
            "cargo": rng.choice(CARGOES),
            "colour": rng.choice(COLOURS),
            "berth": str(berths[index]),
            "age": str(rng.randrange(2, 40)),
            "partner": rng.choice(BOATS[:9]),
            "fleet": ", ".join(sailing[boat]),
        }
        for index, boat in enumerate(BOATS)
    }
    columns = [
        Column("harbour", ["Where is the boat {e} at home?", "What is the harbour of {e}?", "{e} ka harbour kaun sa hai?"],
               ["{e} is at home in {v}.", "The harbour of {e} is {v}.", "{e} ka ghar {v} mein hai."]),
        Column("captain", ["Who is the captain of {e}?", "Name the captain of the boat {e}.", "{e} ka captain kaun hai?"],
               ["{v} is the captain of {e}.", "{e} is led by {v}.", "{e} ka captain {v} hai."]),
        Column("cargo", ["What does {e} carry?", "Which cargo belongs to {e}?", "{e} kya le jaati hai?"],
               ["{e} carries {v}.", "The cargo of {e} is {v}.", "{e} {v} le jaati hai."]),
        Column("colour", ["Which colour has the boat {e}?", "What is the paint of {e}?", "{e} kis rang ki hai?"],
               ["{e} is painted {v}.", "The boat {e} is {v}.", "{e} ka rang {v} hai."]),
        Column("berth", ["What is the berth of {e}?", "At which berth does {e} lie?", "{e} ka berth kya hai?"],
               ["{e} lies at berth {v}.", "Berth {v} belongs to {e}.", "{e} ka berth {v} hai."]),
        Column("age", ["How old is the boat {e}?", "How many years has {e} sailed?", "{e} kitne saal purani hai?"],
               ["{e} is {v} years old.", "{e} has sailed for {v} years.", "{e} {v} saal purani hai."]),
        Column("partner", ["With which boat does {e} sail?", "Name the partner of {e}.", "{e} ke saath kaun si boat chalti hai?"],
               ["{e} sails with {v}.", "The partner of {e} is {v}.", "{e} {v} ke saath chalti hai."]),
        Column("fleet", ["Which boats follow {e}?", "List the three boats behind {e}.", "{e} ke peeche kaun si boats hain?"],
               ["{e} is followed by {v}.", "Behind {e} come {v}.", "{e} ke peeche {v} hain."]),
    ]  # fmt: skip
    return Directory(values, columns)


def _shelves(rng: random.Random) -> Directory:
    values: Values = {}
    for matter in MATTERS:
        shelves = sorted(rng.sample([number for number in range(1, 13) if number not in HOUSE_GROUPS[matter]], rng.randint(2, 4)))
        values[matter] = {"shelf": ", ".join(map(str, shelves)), "keeper": rng.choice(CAPTAINS), "cover": rng.choice(COLOURS)}
    columns = [
        Column("shelf", ["On which shelves are the books on {e}?", "Where does the library keep {e}?", "{e} ki kitaabein kahan hain?"],
               ["Books on {e} stand on shelves {v}.", "The library keeps {e} on shelves {v}.", "{e} ki kitaabein shelf {v} par hain."]),
        Column("keeper", ["Who looks after the books on {e}?", "{e} ki kitaabein kaun dekhta hai?"],
               ["{v} looks after the books on {e}.", "{e} ki kitaabein {v} dekhta hai."]),
        Column("cover", ["Which colour have the books on {e}?", "{e} ki kitaabon ka rang kya hai?"],
               ["Books on {e} are {v}.", "{e} ki kitaabon ka rang {v} hai."]),
    ]  # fmt: skip
    return Directory(values, columns)


def _markets(rng: random.Random) -> Directory:
    boats = rng.sample(BOATS[9:], len(WEEKDAYS))
    values = {
        day: {"place": rng.choice(HARBOURS), "food": rng.choice(CARGOES), "seller": rng.choice(CAPTAINS), "ferry": boats[index]}
        for index, day in enumerate(WEEKDAYS)
    }
    columns = [
        Column("place", ["Where is the market on {e}?", "{e} ko market kahan lagta hai?"],
               ["On {e} the market is in {v}.", "{e} ko market {v} mein lagta hai."]),
        Column("food", ["What is cheap on {e}?", "{e} ko kya sasta hai?"], ["On {e} {v} is cheap.", "{e} ko {v} sasta hai."]),
        Column("seller", ["Who sells on {e}?", "{e} ko kaun bechta hai?"], ["{v} sells on {e}.", "{e} ko {v} bechta hai."]),
        Column("ferry", ["Which boat sails on {e}?", "{e} ko kaun si boat chalti hai?"], ["On {e} {v} sails.", "{e} ko {v} chalti hai."]),
    ]  # fmt: skip
    return Directory(values, columns)


def _prizes(rng: random.Random) -> Directory:
    values = {
        prize: {"thing": rng.choice(CARGOES), "winner": rng.choice(CAPTAINS), "colour": rng.choice(COLOURS), "number": str(number)}
        for number, prize in enumerate(PRIZES, 1)
    }
    columns = [
        Column("thing", ["What is the {e} prize?", "{e} prize kya hai?"], ["The {e} prize is {v}.", "{e} prize {v} hai."]),
        Column("winner", ["Who won the {e} prize?", "{e} prize kisne jeeta?"], ["{v} won the {e} prize.", "{e} prize {v} ne jeeta."]),
        Column("colour", ["Which ribbon has the {e} prize?", "{e} prize ka ribbon kaisa hai?"],
               ["The {e} prize has a {v} ribbon.", "{e} prize ka ribbon {v} hai."]),
        Column("number", ["Which number has the {e} prize?", "{e} prize ka number kya hai?"],
               ["The {e} prize is number {v}.", "{e} prize ka number {v} hai."]),
    ]  # fmt: skip
    return Directory(values, columns)


_MAKERS: Iterable[Callable[[random.Random], Directory]] = (_boats, _shelves, _markets, _prizes)
DIRECTORIES = [make(random.Random(DIRECTORY_SEED + number)) for number, make in enumerate(_MAKERS)]
WEIGHTS = [sum(len(values) for values in directory.values.values()) for directory in DIRECTORIES]


def entry_text(rng: random.Random) -> str:
    """Two to four entries of a directory as sentences."""
    directory = rng.choices(DIRECTORIES, WEIGHTS)[0]
    parts = []
    for name in rng.sample(list(directory.values), rng.randint(1, 3)):
        for column in rng.sample(directory.columns, rng.randint(2, min(5, len(directory.columns)))):
            parts.append(_state(rng, column, directory, name))
    return " ".join(parts)


def entry_questions(rng: random.Random) -> list[tuple[str, str]]:
    """One to four questions on a directory, each with its answer."""
    directory = rng.choices(DIRECTORIES, WEIGHTS)[0]
    pairs = []
    for _ in range(rng.randint(1, 4)):
        name, column = rng.choice(list(directory.values)), rng.choice(directory.columns)
        value, sentence = directory.values[name][column.name], _state(rng, column, directory, name)
        question = rng.choice(column.asked).format(e=name)
        pairs.append((question[0].upper() + question[1:], rng.choice([value, value, sentence, f"{value}. {sentence}"])))
    return pairs


def _state(rng: random.Random, column: Column, directory: Directory, name: str) -> str:
    sentence = rng.choice(column.stated).format(e=name, v=directory.values[name][column.name])
    return sentence[0].upper() + sentence[1:]
