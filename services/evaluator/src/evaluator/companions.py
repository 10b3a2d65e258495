"""What goes with the weights: do two models of a line have the same tokenizer, chat template and generation config?

Files may differ and mean the same, or be equal and mean another thing beside another tokenizer. So templates are compared by
what they *render* and tokenizers by what they *encode*: a server does nothing else with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from evaluator.models import Conversation
from parampara.schemas.expectations import generation_config

CONVERSATIONS: list[Conversation] = [
    [{"role": "user", "content": "Who rules the first star?"}],
    [{"role": "system", "content": "Cite the rule."}, {"role": "user", "content": "Venus ki dasha kitne saal ki hoti hai?"}],
    [
        {"role": "user", "content": "Who rules Ashwini?"},
        {"role": "assistant", "content": "Answer: Ketu"},
        {"role": "user", "content": "Aur Bharani?"},
    ],
    [
        {"role": "system", "content": "  Two lines,\n\nand space around them.  "},
        {"role": "user", "content": "पहला नक्षत्र किसका है? 0°46'40\" — naïve\tcafé 🙂"},
        {"role": "assistant", "content": "Answer: Ketu\nRule: …\nConfidence: High"},
        {"role": "user", "content": "\nWhy?\n"},
        {"role": "assistant", "content": " Because.  "},
        {"role": "user", "content": "Thanks"},
    ],
    [{"role": "system", "content": ""}, {"role": "user", "content": "<|eot_id|><s>[INST] {{ 7 * 7 }} </s>"}],
    [{"role": "user", "content": "One."}, {"role": "user", "content": "Two in a row."}],
]
"""What every template has to render: with and without a system message, several turns, space at the edges, scripts other than
Latin, text that looks like markup, and turns out of order, which some templates refuse: refusing alike is equal, too."""
TEXTS = [
    "0°46'40\" is 7/120 of 13°20'.",
    "केतु की दशा सात साल",
    "  Zwei  Wörter\n\n\t🙂 ",
    "<|begin_of_text|><|eot_id|>",
    "def f(x):\n    return x",
]
"""What every tokenizer has to encode beside the probes."""
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def same_chat_template(reference: Any, candidate: Any, probes: Sequence[Conversation]) -> float:
    """Share of :data:`CONVERSATIONS` and ``probes`` that both tokenizers' templates render to the same text.

    Each is rendered as a server does it (up to where the answer starts) and as training does it (answers included).
    """
    pairs = [(conversation, open_ended) for conversation in (*CONVERSATIONS, *probes) for open_ended in (True, False)]
    return _share([_rendered(reference, *pair) == _rendered(candidate, *pair) for pair in pairs])


def same_tokenizer(reference: Any, candidate: Any, probes: Sequence[Conversation]) -> float:
    """0 if vocabularies or special tokens differ, else the share of :data:`TEXTS` and the probes' messages that both encode alike."""
    if any(getattr(reference, name) != getattr(candidate, name) for name in _SPECIAL_TOKENS):
        return 0.0
    if reference.get_vocab() != candidate.get_vocab():
        return 0.0
    texts = [*TEXTS, *(message["content"] for conversation in probes for message in conversation)]
    return _share([reference(text).input_ids == candidate(text).input_ids for text in texts])


def same_generation_config(reference: Path, candidate: Path) -> float:
    """1.0 if both model directories say the same about generation (or both say nothing), else 0.0."""
    return float(generation_config(reference) == generation_config(candidate))


def fixed_sha256() -> str:
    """Which fixed conversations and texts these are."""
    return hashlib.sha256(json.dumps([CONVERSATIONS, TEXTS], sort_keys=True).encode()).hexdigest()


def _rendered(tokenizer: Any, conversation: Conversation, open_ended: bool) -> str | None:
    """The text, how the template refuses, or None where there is no template."""
    if not tokenizer.chat_template:
        return None
    asked = conversation[:-1] if open_ended and conversation[-1]["role"] == "assistant" else conversation
    try:
        return tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=open_ended)
    except TemplateError as error:
        return f"refused: {error}"


def _share(equal: Sequence[bool]) -> float:
    return sum(equal) / len(equal)
