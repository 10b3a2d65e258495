"""The parity ledger of a model: how it came about, and how well each model of its line agrees with the one before it.

Written as ``ledger.json`` into the evaluation artifact. One transition is one step of base + adapter -> dapt -> sft -> quantized, or
of ... -> sft -> dpo -> quantized; its figures are what a gate names ``parity.<transition>.<figure>``. The step into the final merged
model is called ``merged`` in either line.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from parampara.schemas.stages import Strict

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]


class LedgerModel(Strict):
    """What a model of the line was, byte for byte."""

    name: str
    """``base``, ``dapt_adapter``, ``dapt``, ``sft_adapter``, ``sft``, ``dpo_adapter``, ``dpo`` or ``quantized``; the final merged model is
    ``dpo`` where the line has it, else ``sft``."""
    weights_sha256: Sha256
    """:func:`parampara.manifest.weights_fingerprint` of the model directory; of an adapter's, that of the model it is applied to."""
    adapter_sha256: Sha256 | None = None
    """The same of the adapter's directory."""
    trained_on_sha256: Sha256 | None = None
    """Fingerprint of the model that the adapter was trained on, as the adapter itself says; None where it does not say."""
    tokenizer_sha256: Sha256 | None
    """Of ``tokenizer.json``, which a tokenizer without a fast form does not have."""
    chat_template_sha256: Sha256 | None
    """Of the chat template's text."""


class LedgerProbes(Strict):
    """What was put to every model: equal hashes mean that two ledgers can be compared."""

    sha256: Sha256
    """Over the token ids of the probes and which of them are compared."""
    conversations: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]
    """Whose predictions are compared."""
    rendered_sha256: Sha256
    """Over the conversations that every chat template has to render and the texts that every tokenizer has to encode."""


class LedgerTransition(Strict):
    """From ``reference`` to ``candidate``. A figure is null where it has no meaning, could not be measured, or is not finite."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")]
    reference: str
    candidate: str
    kl: float | None = None
    """KL(reference || candidate), mean over all probe tokens, nats."""
    top1: Share | None = None
    """Share of probe tokens where both name the same most likely next token."""
    greedy_match: Share | None = None
    """Share of probes whose greedy answers are identical."""
    greedy_prefix: Share | None = None
    """Mean share of the reference's greedy answer before the first different token."""
    perplexity_change: float | None = None
    """Perplexity of the probes' own tokens, candidate against reference: 0.01 is one per cent more."""
    recovered: float | None = None
    """How much of what the adapter changed is in the candidate: 1 for an exact merge, 0 for one that was skipped."""
    base_kl: float | None = None
    """KL(base || candidate), nats per probe token."""
    differs_from_base: Share | None = None
    """1 if the candidate is another model than the base, 0 if whatever made it did nothing."""
    adapter_base: Share | None = None
    """1 if the reference's adapter was trained on exactly the weights it is applied to, 0 if on others."""
    tokenizer: Share
    """0 if vocabularies or special tokens differ, else the share of texts that both encode alike."""
    chat_template: Share
    """Share of conversations that both templates render to the same text."""
    generation_config: Share
    """1 if both say the same about generation, else 0."""

    def metrics(self) -> dict[str, float]:
        """The figures by the names that gates use."""
        figures = self.model_dump(exclude={"name", "reference", "candidate"}, exclude_none=True)
        return {f"parity.{self.name}.{figure}": value for figure, value in figures.items()}


class ParityLedger(Strict):
    """The whole ledger, models oldest first."""

    format: Literal[1] = 1
    probes: LedgerProbes
    models: Annotated[list[LedgerModel], Field(min_length=2)]
    transitions: list[LedgerTransition]

    def metrics(self) -> dict[str, float]:
        return {name: value for transition in self.transitions for name, value in transition.metrics().items()}
