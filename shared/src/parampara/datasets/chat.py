"""Conversations as a tokenizer's own chat template renders them, and where the assistant's answers lie in them.

The text before each answer (with the generation prompt) and the answer with its end-of-turn marker are kept apart, exactly where
the server's prompt ends and the model's own tokens begin: tokenized apart, no token straddles the border. Training, evaluation
and quantization all render through this module, so what is measured is what was trained. Tokenizers come in as they are; they
need ``chat_template`` and ``apply_chat_template`` as transformers has them.
"""

from __future__ import annotations

from typing import Any

from parampara.datasets.qa import QaRow
from parampara.errors import InvalidData

Conversation = list[dict[str, str]]
"""Messages as a chat template takes them: ``[{"role": "user", "content": "..."}, ...]``."""


def conversation_of(row: QaRow, *, system_prompt: str | None = None) -> Conversation:
    """The row's messages; ``system_prompt`` stands first where the row has no system message of its own."""
    messages: Conversation = [{"role": message.role, "content": message.content} for message in row.messages]
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def segments(tokenizer: Any, conversation: Conversation, *, name: str = "conversation") -> list[tuple[str, bool]]:
    """The rendered conversation in order as ``(text, is an answer)``; an answer includes its end mark. ``name`` is for messages.

    Raises:
        InvalidData: the tokenizer has no chat template, or one that does not render turn by turn.
    """
    parts: list[tuple[str, bool]] = []
    done = ""
    for position, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, conversation[:position], add_generation_prompt=True)
        after = render(tokenizer, conversation[: position + 1], add_generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before) and len(after) > len(before)):
            raise InvalidData(
                f"{name}: the tokenizer's chat template does not render message {position} as its generation prompt, the answer and an "
                "end marker, so the answer's tokens can not be told from the prompt's.",
                param="model",
            )
        parts += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return parts


def render(tokenizer: Any, conversation: Conversation, *, add_generation_prompt: bool) -> str:
    """The conversation as text.

    Raises:
        InvalidData: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidData("The model's tokenizer has no chat template: questions cannot be put to it.", param="model")
    return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of rendered text: the template has written the special tokens already."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
