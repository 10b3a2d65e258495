"""Code-Mixing Index and switch rate on sentences counted by hand."""

from __future__ import annotations

import pytest

from evaluator import code_mixing
from evaluator.code_mixing import cmi, learn, metrics, mixing, switches

ENGLISH = ["The tenth cusp gives the job in the dasha of Venus.", "Venus rules the second star of the sign, so go to the main table."] * 3
HINGLISH = ["Tenth cusp ka sub lord job dega, to main kahunga.", "Venus ki dasha bees saal tak chalti hai.", "To job milega to bhi."] * 3


@pytest.fixture(scope="module")
def lexicon() -> code_mixing.Lexicon:
    found = learn(ENGLISH, HINGLISH)
    assert found is not None
    return found


def test_words_get_their_language_from_the_rows(lexicon: code_mixing.Lexicon) -> None:
    assert {"ka", "dega", "bees", "chalti", "kahunga"} <= lexicon.hindi
    assert {"tenth", "cusp", "job", "dasha", "venus", "the"} <= lexicon.english
    assert lexicon.tongues("Xyzzy 42 dasha") == ["english"], "a word that neither uses, and a number, have no language"
    assert not lexicon.english & lexicon.hindi


def test_a_word_of_both_is_hindi_only_where_hinglish_uses_it_much_oftener() -> None:
    lexicon = learn(["to go to the star"] + ["the star of the sign"] * 40, ["to job milega to bhi"] * 20 + ["star"] * 20)
    assert lexicon is not None
    assert "to" in lexicon.hindi
    assert "star" in lexicon.english


def test_the_index_is_the_papers(lexicon: code_mixing.Lexicon) -> None:
    # venus-E ki-H dasha-E bees-H saal-H tak-H chalti-H hai-H: 6 of 8 are Hindi
    tongues = lexicon.tongues("Venus ki dasha bees saal tak chalti hai.")
    assert cmi(tongues) == pytest.approx(1 - 6 / 8)
    assert switches(tongues) == pytest.approx(3 / 7)
    assert cmi(["english", "hindi"]) == 0.5
    assert (cmi([]), switches([])) == (0.0, 0.0)


@pytest.mark.parametrize("text", [ENGLISH[0], "Bees saal tak chalti hai."])
def test_one_language_alone_is_not_mixed(lexicon: code_mixing.Lexicon, text: str) -> None:
    assert cmi(lexicon.tongues(text)) == switches(lexicon.tongues(text)) == 0.0


def test_an_answer_in_plain_english_is_far_from_mixed_references(lexicon: code_mixing.Lexicon) -> None:
    near = metrics(lexicon, answers=HINGLISH[:2], references=HINGLISH[:2])
    far = metrics(lexicon, answers=ENGLISH[:2], references=HINGLISH[:2])
    assert near["language.cmi.difference"] == near["language.switches.difference"] == 0.0
    assert far["language.cmi.difference"] == far["language.cmi.reference"] == near["language.cmi.answers"] > 0.2


def test_texts_too_short_to_tell_do_not_count(lexicon: code_mixing.Lexicon) -> None:
    assert mixing(lexicon, ["Answer: Venus", ""]) is None
    assert metrics(lexicon, answers=["Venus"], references=HINGLISH).keys() == {"language.cmi.reference", "language.switches.reference"}


def test_one_language_teaches_no_lexicon() -> None:
    assert learn(ENGLISH, []) is None
    assert learn([], HINGLISH) is None
