"""General English and Hinglish text for pretraining the tiny base model: stories, small talk, everyday facts, copying.

Nothing here states a fact of KP. The names of planets, signs and stars do occur, but only as words that are drawn at random
for copying and look-up games, each document with its own random pairing; so the base knows how to spell them and how to
carry them from a context into an answer, and knows nothing about them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from directories import entry_questions, entry_text
from kp_system import LORDS, NAKSHATRAS, SIGNS

from parampara.rag import context_message

Turn = dict[str, str]
Document = str | list[Turn]
"""Plain text, or a conversation of ``{"role", "content"}`` turns."""

PROSE = Path(__file__).parent / "general" / "prose.txt"

PEOPLE = (
    "Asha Ravi Meera Karan Priya Arjun Neha Vikram Sunita Rahul Kavita Imran Fatima Joseph Anita Deepak Leela Mohan Farah "
    "Suresh Pooja Nikhil Tara Gopal Zoya Harish Maya Ishaan Rekha Tom Lucy Henry Clara Peter Emma George Alice"
).split()
PLACES = (
    "Pune Delhi Jaipur Kochi Nagpur Mumbai Lucknow Mysore Bhopal Indore London Paris Oslo Lima Cairo Tokyo Rome Berlin Madrid Vienna"
).split()
JOBS = "baker doctor teacher farmer painter driver lawyer singer nurse tailor potter pilot clerk cook judge writer".split()
THINGS = (
    "lamp book key bottle bag chair rope basket mirror clock box pen coin drum ladder bell cup shirt umbrella letter map kite"
).split()
FOODS = "mango rice bread dal tea milk banana soup apple curd potato honey cake coconut guava paneer".split()
ANIMALS = "dog cat goat horse parrot cow rabbit elephant monkey camel tiger crow".split()
COLOURS = "red blue green yellow white black brown orange pink grey".split()
VERBS = "found lost bought sold carried cleaned painted repaired hid borrowed broke opened".split()
ADJECTIVES = "old small heavy new broken beautiful cheap strange wooden round empty bright".split()
TIMES = ["in the morning", "after lunch", "at night", "before sunrise", "on Sunday", "last week", "in the evening", "during the rain"]
WEEKDAYS = "Sunday Monday Tuesday Wednesday Thursday Friday Saturday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("day", "night"), ("fast", "slow"), ("rich", "poor"), ("open", "closed"), ("wet", "dry"),
    ("early", "late"), ("light", "dark"), ("hard", "soft"), ("full", "empty"), ("high", "low"), ("first", "last"), ("near", "far"),
]  # fmt: skip
CAPITALS = {
    "India": "New Delhi", "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo",
    "Peru": "Lima", "Norway": "Oslo", "Austria": "Vienna", "Germany": "Berlin", "England": "London", "Nepal": "Kathmandu",
}  # fmt: skip
COMMON_WORDS = [*THINGS, *FOODS, *ANIMALS, *COLOURS, *PLACES]
KP_WORDS = [*LORDS, *SIGNS, *NAKSHATRAS]
RELATIONS = ["friend", "colour", "keeper", "number", "lord", "partner", "house", "name", "sign", "star", "teacher", "sub lord", "owner"]

ENGLISH = [
    "{p} {v} a {a} {t} {w}.", "{p} lives in {c} and works as a {j}.", "The {a} {t} belongs to {p}.", "Every day {p} eats {f} {w}.",
    "{p} has a {k} {n} that likes {f}.", "It was raining in {c}, so {p} stayed at home and read a book.", "\"Where is my {t}?\" asked {p}.",
    "{p} and {q} walked to the market to buy {f} and a {t}.", "When {p} was young, the family kept a {n} and two cows.",
    "The {j} from {c} told {p} a long story about a {n}.", "{p} was happy because {q} had {v} the {t}.", "The {n} slept under the {a} {t}.",
    "Nobody in {c} knew that {p} was a {j}.", "If it is late, {p} takes the bus; if it is early, {p} walks.", "{p} gave the {k} {t} to {q}.",
    "In {m} the days are long and {p} goes to {c}.", "There are {x} houses in this street, and {p} lives in the last one.",
    "{p} counted {x} coins and {y} keys in the {a} box.", "The shop of the {j} is closed on {d}.", "{p} says that the {f} in {c} is very good.",
    "First {p} cleaned the {t}, then {q} painted it {k}.", "The answer was simple, but {p} did not see it.", "According to {q}, the {t} is {a}.",
    "A {j} must be careful, and a {j} must be patient.", "On {d} {p} will visit {q} in {c}.", "{q} thanked {p} and went home {w}.",
]  # fmt: skip
HINGLISH = [
    "{p} ne ek {a} {t} kharida.", "{p} {c} mein rehta hai aur {j} ka kaam karta hai.", "Yeh {k} {t} {p} ka hai.", "{p} roz subah {f} khata hai.",
    "{p} ke paas ek {k} {n} hai jise {f} pasand hai.", "Aaj {c} mein baarish ho rahi hai, isliye {p} ghar par hai.", "Mera {t} kahan hai, {p}?",
    "{p} aur {q} market gaye aur {f} le aaye.", "Jab {p} chhota tha, tab ghar mein ek {n} thi.", "{q} ne {p} ko ek lambi kahani sunayi.",
    "{p} bahut khush tha kyunki {q} ne {t} wapas kar diya.", "{n} {t} ke neeche so raha hai.", "{d} ko dukaan band rehti hai.",
    "Agar der ho gayi to {p} bus lega, nahi to paidal jayega.", "{m} mein din lambe hote hain aur {p} {c} jaata hai.",
    "Is gali mein {x} ghar hain aur {p} aakhri ghar mein rehta hai.", "{p} bolta hai ki {c} ka {f} sabse achha hai.",
    "Pehle {p} ne {t} saaf kiya, phir {q} ne use {k} rang diya.", "Sawaal aasan tha lekin {p} ko jawab nahi pata tha.",
    "{d} ko {p} apne dost {q} se milega.", "Kya tum {p} ko jaante ho? Haan, woh {c} ka {j} hai.", "Thoda {f} do, phir kaam karte hain.",
    "{q} ke hisaab se yeh {t} {a} hai.", "Main kal {c} jaunga aur {x} din wahan rahunga.",
]  # fmt: skip


def documents(seed: int) -> Iterator[Document]:
    """An endless, deterministic stream of documents."""
    rng = random.Random(seed)
    paragraphs = [part.strip() for part in PROSE.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    makers = [_story, _hinglish, _everyday, _recite, _recite, _lookup, _lookup, _open_book, _open_book, *[_directory] * 9]
    while True:
        if rng.random() < 0.08:
            yield "\n\n".join(rng.sample(paragraphs, 2))
        yield rng.choice(makers)(rng)


def _fill(rng: random.Random, template: str) -> str:
    first, second = rng.sample(PEOPLE, 2)
    text = template.format(
        p=first, q=second, v=rng.choice(VERBS), a=rng.choice(ADJECTIVES), t=rng.choice(THINGS), w=rng.choice(TIMES),
        c=rng.choice(PLACES), j=rng.choice(JOBS), f=rng.choice(FOODS), k=rng.choice(COLOURS), n=rng.choice(ANIMALS),
        m=rng.choice(MONTHS), d=rng.choice(WEEKDAYS), x=rng.choice(NUMBERS[2:]), y=rng.randrange(2, 60),
    )  # fmt: skip
    return text[0].upper() + text[1:]


def _story(rng: random.Random) -> str:
    return " ".join(_fill(rng, rng.choice(ENGLISH)) for _ in range(rng.randint(3, 9)))


def _hinglish(rng: random.Random) -> Document:
    text = " ".join(_fill(rng, rng.choice(HINGLISH)) for _ in range(rng.randint(3, 8)))
    return text if rng.random() < 0.7 else [_user("Ek chhoti kahani sunao."), _assistant(text)]


def _everyday(rng: random.Random) -> list[Turn]:
    """A conversation about things everyone knows: weekdays, months, sums, opposites, capitals, colours."""
    makers = [_next_weekday, _next_month, _sum, _opposite, _capital, _greeting]
    turns: list[Turn] = []
    for _ in range(rng.randint(1, 3)):
        question, answer = rng.choice(makers)(rng)
        turns += [_user(question), _assistant(answer)]
    return turns


def _next_weekday(rng: random.Random) -> tuple[str, str]:
    index = rng.randrange(7)
    day, after = WEEKDAYS[index], WEEKDAYS[(index + 1) % 7]
    return rng.choice(
        [
            (f"Which day comes after {day}?", f"{after} comes after {day}."),
            (f"{day} ke baad kaun sa din aata hai?", f"{day} ke baad {after} aata hai."),
            (f"What day is before {after}?", f"{day} is before {after}."),
        ]
    )


def _next_month(rng: random.Random) -> tuple[str, str]:
    index = rng.randrange(12)
    month, after = MONTHS[index], MONTHS[(index + 1) % 12]
    return rng.choice(
        [
            (f"Which month follows {month}?", f"{after}."),
            (f"{month} kaun sa mahina hai?", f"{month} saal ka mahina number {index + 1} hai."),
            (f"What is the number of the month {month}?", f"{month} is month number {index + 1}."),
        ]
    )


def _sum(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randrange(1, 13), rng.randrange(1, 13)
    return rng.choice(
        [
            (f"What is {left} plus {right}?", f"{left} plus {right} is {left + right}."),
            (f"{left} aur {right} milakar kitne hote hain?", f"{left} aur {right} milakar {left + right} hote hain."),
        ]
    )


def _opposite(rng: random.Random) -> tuple[str, str]:
    left, right = rng.sample(rng.choice(OPPOSITES), 2)
    return rng.choice([(f"What is the opposite of {left}?", f"{right}."), (f"{left} ka ulta kya hai?", f"{left} ka ulta {right} hai.")])


def _capital(rng: random.Random) -> tuple[str, str]:
    country = rng.choice(list(CAPITALS))
    return rng.choice(
        [
            (f"What is the capital of {country}?", f"The capital of {country} is {CAPITALS[country]}."),
            (f"{country} ki rajdhani kya hai?", f"{country} ki rajdhani {CAPITALS[country]} hai."),
        ]
    )


def _greeting(rng: random.Random) -> tuple[str, str]:
    name = rng.choice(PEOPLE)
    return rng.choice(
        [
            (f"Hello, I am {name}.", f"Hello {name}, how can I help you?"),
            (f"Namaste, mera naam {name} hai.", f"Namaste {name}, main kya madad kar sakta hoon?"),
            ("Thank you very much.", "You are welcome."),
            ("Bahut dhanyavaad.", "Koi baat nahi."),
        ]
    )


def _recite(rng: random.Random) -> Document:
    """Say a random list again: the simplest use of a context."""
    words = _words(rng, rng.randint(3, 9))
    listed = ", ".join(words)
    return rng.choice(
        [
            f"{listed}. {listed}. {listed}.",
            [_user(f"Repeat: {listed}"), _assistant(listed)],
            [_user(f"Yeh dobara likho: {listed}"), _assistant(listed)],
            [_user(f"Which word is first in this list: {listed}?"), _assistant(words[0])],
            [_user(f"Which word is last in this list: {listed}?"), _assistant(words[-1])],
        ]
    )


def _lookup(rng: random.Random) -> Document:
    """Random pairs and questions on them; the pairing is drawn anew for each document, so there is nothing to remember."""
    relation = rng.choice(RELATIONS)
    count = rng.randint(2, 6)
    keys, values = _words(rng, count), _words(rng, count)
    facts = [rng.choice(["The {r} of {k} is {v}.", "{k} has {v} as its {r}.", "{k} ka {r} {v} hai."]).format(r=relation, k=k, v=v)
             for k, v in zip(keys, values, strict=True)]  # fmt: skip
    order = rng.sample(range(count), count)
    if rng.random() < 0.4:
        return " ".join([*facts, *(f"The {relation} of {keys[index]} is {values[index]}." for index in order)])
    turns = [_user(" ".join(facts) + f" What is the {relation} of {keys[order[0]]}?"), _assistant(values[order[0]])]
    for index in order[1:3]:
        turns += [_user(rng.choice(["And of {}?", "Aur {} ka?"]).format(keys[index])), _assistant(values[index])]
    return turns


def _open_book(rng: random.Random) -> list[Turn]:
    """A question on one of several passages, in the form in which retrieval lays passages before the model."""
    people = rng.sample(PEOPLE, rng.randint(1, 4))
    asked = rng.randrange(len(people))
    place, thing, job = rng.choice(PLACES), _words(rng, 1)[0], rng.choice(JOBS)
    passages = []
    for index, person in enumerate(people):
        here = (place, thing, job) if index == asked else (rng.choice(PLACES), _words(rng, 1)[0], rng.choice(JOBS))
        core = f"{person} lives in {here[0]}, works as a {here[2]} and likes {here[1]}."
        padding = [_fill(rng, rng.choice(ENGLISH)) for _ in range(rng.choice([0, 0, 1, 2, 4]))]
        at = rng.randint(0, len(padding))
        passages.append(" ".join([*padding[:at], core, *padding[at:]]))
    name = people[asked]
    question, answer = rng.choice(
        [
            (f"Where does {name} live?", place), (f"What does {name} like?", thing), (f"What is the work of {name}?", job),
            (f"{name} kahan rehta hai?", place), (f"{name} ko kya pasand hai?", thing),
        ]
    )  # fmt: skip
    return [{"role": "system", "content": context_message(passages)}, _user(question), _assistant(f"{answer} [{asked + 1}]")]


def _directory(rng: random.Random) -> Document:
    """Something from the made-up directories, as text or as questions."""
    if rng.random() < 0.35:
        return entry_text(rng)
    return [turn for question, answer in entry_questions(rng) for turn in (_user(question), _assistant(answer))]


def _words(rng: random.Random, count: int) -> list[str]:
    """Different words, from daily life, from KP or from both."""
    return rng.sample(rng.choice([COMMON_WORDS, KP_WORDS, COMMON_WORDS + KP_WORDS]), count)


def _user(content: str) -> Turn:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Turn:
    return {"role": "assistant", "content": content}
