"""How many tokens a text has, without the tokenizer of any one embedding model.

The embedder behind the URL may be any server, so chunks are cut by an estimate: word-piece vocabularies keep common words
whole and cut rarer ones, above all romanised Indian words, into pieces of three characters. English prose comes out a quarter too
high and romanised Hindi a quarter too low (measured with MiniLM), so 200 of these tokens fit its window of 254 in both.
"""

from __future__ import annotations

import re

_PIECE = re.compile(r"\w+|[^\w\s]")
_WHOLE_WORD = 4
_PIECE_CHARACTERS = 3


def estimate_tokens(text: str) -> int:
    """Tokens of ``text`` by rule of thumb; 0 for an empty one."""
    return sum(_of_word(match.group()) for match in _PIECE.finditer(text))


def _of_word(word: str) -> int:
    if not word.isascii():
        return len(word)  # scripts that small vocabularies spell out character by character
    return 1 if len(word) <= _WHOLE_WORD else -(-len(word) // _PIECE_CHARACTERS)
