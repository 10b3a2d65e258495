"""The models of a line in order, what they are measured on, and what was measured on each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evaluator import parity
from evaluator.expectations import Prepared, prepare
from evaluator.heldout import HeldOut, read_held_out
from evaluator.models import load_tokenizer, require_whole
from evaluator.perplexity import Loss, Scored, text_sequences
from parampara.errors import InvalidData
from parampara.schemas.expectations import Expectations
from parampara.schemas.stages import EvaluateConfig

GREEDY_PROBE_TOKENS = 32


@dataclass(frozen=True)
class Member:
    """One model of the line. ``measured``: texts and questions are put to it, not only the parity probes."""

    name: str
    directory: Path
    adapter: Path | None = None
    measured: bool = True

    @property
    def source(self) -> Path:
        """Where its tokenizer and chat template come from."""
        return self.adapter if self.adapter is not None and (self.adapter / "tokenizer.json").is_file() else self.directory


@dataclass(frozen=True)
class Material:
    """The held-out data, and its token sequences as the base's tokenizer gives them."""

    held_out: HeldOut
    texts: list[Scored]
    probes: list[parity.Probe]
    expected: list[Prepared]
    """What the deployment will ask the live endpoint, answered here by the last model of the line."""


@dataclass
class Measured:
    """What was measured on one model; nothing for a member of which the ledger alone needs a recording."""

    text: Loss | None = None
    answer: Loss | None = None
    answer_losses: list[Loss | None] = field(default_factory=list)
    """Of each question's reference answer; None where the question alone fills the window."""
    answers: list[str] = field(default_factory=list)
    expectations: Expectations | None = None
    """Of the last model alone."""


def members(config: EvaluateConfig) -> list[Member]:
    """The models of the line, oldest first, as far as the config names them.

    ``base``; ``dapt_adapter`` on it; ``dapt``, the merged DAPT model, or the adapter on the base where none was written;
    ``sft_adapter`` on that; ``sft``, the merged model after it; where there was DPO ``dpo_adapter`` on that and ``dpo``, merged; then
    ``quantized``. The last of them before that is the final merged model, :func:`parampara.schemas.metrics.last_merged`.

    Raises:
        InvalidData: an SFT or DPO adapter without the model it was trained on, or a merged SFT model before the final one without DPO.
    """
    if (config.dpo_adapter is None) != (config.sft_merged is None):
        raise InvalidData(
            "dpo_adapter was trained on the merged SFT model; name both or neither, the model in sft_merged.", param="sft_merged"
        )
    line = [Member("base", config.base)]
    if config.dapt_adapter is not None and config.dapt_merged is not None:
        line.append(Member("dapt_adapter", config.base, config.dapt_adapter, measured=False))
    if config.dapt_merged is not None:
        line.append(Member("dapt", config.dapt_merged))
    elif config.dapt_adapter is not None:
        line.append(Member("dapt", config.base, config.dapt_adapter))
    if config.sft_adapter is not None:
        if config.dapt_adapter is not None and config.dapt_merged is None:
            raise InvalidData("sft_adapter was trained on the merged DAPT model; name that model in dapt_merged.", param="dapt_merged")
        line.append(Member("sft_adapter", config.dapt_merged or config.base, config.sft_adapter, measured=False))
    if config.sft_merged is not None:
        line += [Member("sft", config.sft_merged), Member("dpo_adapter", config.sft_merged, config.dpo_adapter, measured=False)]
    line.append(Member("sft" if config.sft_merged is None else "dpo", config.merged))
    if config.quantized is not None:
        line.append(Member("quantized", config.quantized))
    return line


def check_weights(line: Sequence[Member]) -> None:
    """Look at every weight file's header before hours go into measuring.

    Raises:
        InvalidData: a shard is missing, cut off or no safetensors file, or does not hold what the index says.
    """
    directories = [directory for member in line for directory in (member.directory, member.adapter) if directory is not None]
    for directory in dict.fromkeys(directories):
        require_whole(directory)


def read_material(config: EvaluateConfig) -> Material:
    """Read the held-out data and make token sequences of it.

    Raises:
        InvalidData: a file or the base's directory is not what it has to be.
    """
    tokenizer = load_tokenizer(config.base)
    held_out = read_held_out(config, tokenizer)
    positions = json.loads((config.base / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings", 1 << 20)
    return Material(
        held_out=held_out,
        texts=text_sequences(tokenizer, held_out.texts, max_tokens=min(config.dapt_params.chunk_tokens + 1, positions)),
        probes=parity.make_probes(tokenizer, held_out.probes, max_tokens=positions - GREEDY_PROBE_TOKENS),
        expected=prepare(tokenizer, held_out.probes, positions=positions),
    )


def work(member: Member, material: Material) -> int:
    """Items that measuring this member takes, as :class:`evaluator.meter.Meter` counts them."""
    probes = 2 * len(material.probes)
    return probes + (len(material.texts) + 2 * len(material.held_out.questions) if member.measured else 0)
