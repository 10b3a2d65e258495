"""Pairs of answers to training rows: each pair is one row of two documents, the better answer's conversation first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from parampara.datasets import Message, PreferenceRow, QaRow, read_preferences
from parampara.datasets.chat import conversation_of, segments, token_ids
from parampara.errors import InvalidData
from parampara.schemas.stages import DpoConfig
from trainer.binning import by_length
from trainer.chat import rows_of
from trainer.layout import Layout
from trainer.rows import IGNORED, StageData, TokenRow


def build_rows(config: DpoConfig, tokenizer: Any) -> StageData:
    """Read, split and tokenize the pairs. All pairs about one question are on one side of the split.

    Raises:
        InvalidData: a file is faulty, the tokenizer has no usable chat template, or nothing is left of an answer.
    """
    return rows_of(config, tokenizer, read=read_preferences, tokenize=tokenize_pair)


def tokenize_pair(
    pair: PreferenceRow, tokenizer: Any, *, system_prompt: str | None, max_length: int, name: str = "row", cut: list[str] | None = None
) -> TokenRow:
    """Both conversations as the server renders them, each cut at ``max_length``, with labels on the last answer's tokens.

    ``name`` says which row in messages; names of rows that had to be cut are added to ``cut``.

    Raises:
        InvalidData: nothing of an answer is left below ``max_length``, the answers are equal up to there, or the template does not
            render turn by turn.
    """
    sides: list[TokenRow] = []
    longest = 0
    for answer in (pair.chosen, pair.rejected):
        told = conversation_of(QaRow(messages=[*pair.prompt, Message("assistant", answer)]), system_prompt=system_prompt)
        parts = [token_ids(tokenizer, text) for text, _ in segments(tokenizer, told, name=name)]
        ids = [token for part in parts for token in part]
        asked = len(ids) - len(parts[-1])
        if asked >= max_length:
            raise InvalidData(
                f"{name}: the conversation before the answers has {asked} tokens, and max_seq_length is {max_length}: nothing of the "
                "answers would be left to compare. Shorten it or raise max_seq_length.",
                param="params.train.max_seq_length",
            )
        longest = max(longest, len(ids))
        ids, labels = ids[:max_length], ([IGNORED] * asked + parts[-1])[:max_length]
        sides.append(TokenRow(ids, labels))
    if sides[0].input_ids == sides[1].input_ids:
        raise InvalidData(
            f"{name}: the two answers do not differ within max_seq_length ({max_length}) tokens; raise it or leave the pair out.",
            param="params.train.max_seq_length",
        )
    if longest > max_length and cut is not None:
        cut.append(name)
    chosen, rejected = sides
    return TokenRow(
        chosen.input_ids + rejected.input_ids,
        chosen.labels + rejected.labels,
        parts=(len(chosen.input_ids), len(rejected.input_ids)),
    )


class PairLayout(Layout):
    """Pairs of similar length in one padded batch, first all better answers, then all worse ones, as TRL's ``DPOTrainer`` takes them."""

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of the pairs of each micro-batch; ``lengths`` are those of both documents of each pair in turn."""
        return by_length([2 * longer for longer in _longer(lengths)], self.max_tokens)

    def positions(self, lengths: Sequence[int]) -> list[int]:
        longer = _longer(lengths)
        return [2 * len(group) * max(longer[i] for i in group) for group in self.groups(lengths)]

    def collate(self, rows: Iterable[TokenRow]) -> list[dict[str, Any]]:
        """``input_ids``, ``attention_mask`` and ``completion_mask`` of each micro-batch, each (2 x pairs, longest)."""
        pairs = [row.split() for row in rows]
        return [self._batch([pairs[i] for i in group]) for group in self.groups([len(side.input_ids) for pair in pairs for side in pair])]

    def _batch(self, pairs: list[list[TokenRow]]) -> dict[str, Any]:
        documents = [pair[side] for side in (0, 1) for pair in pairs]
        ids = [torch.tensor(document.input_ids) for document in documents]
        answers = [torch.tensor([int(label != IGNORED) for label in document.labels]) for document in documents]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "completion_mask": pad_sequence(answers, batch_first=True),
        }


def pairs_in(batch: dict[str, Any]) -> int:
    """Of a micro-batch that :class:`PairLayout` made."""
    return len(batch["input_ids"]) // 2


def _longer(lengths: Sequence[int]) -> list[int]:
    return [max(lengths[i : i + 2]) for i in range(0, len(lengths), 2)]
