"""Writes the parity ledger of a line: who its models were, and how the two sides of each transition agree."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluator import companions, parity
from evaluator.ledger import Ledger, Transition, transitions
from evaluator.line import Material, Member
from evaluator.meter import Meter
from evaluator.models import load_tokenizer
from parampara.errors import InvalidData
from parampara.manifest import sha256_file, weights_fingerprint
from parampara.schemas.ledger import LedgerModel, LedgerProbes, LedgerTransition, ParityLedger
from parampara.weights import full

_SHA256_NAME = "sha256:"


def write_ledger(line: Sequence[Member], material: Material, ledger: Ledger, *, meter: Meter) -> ParityLedger:
    """The ledger as it is stored; every weight of the line is hashed once.

    Raises:
        InvalidData: a directory holds no weights or no tokenizer.
        Preempted: asked to stop.
    """
    fingerprints: dict[Path, str] = {}
    for member in line:
        for directory in (member.directory, member.adapter):
            if directory is not None and directory not in fingerprints:
                meter.phase(f"fingerprint of {member.name}")
                fingerprints[directory] = weights_fingerprint(directory)
    models = {member.name: _model(member, fingerprints) for member in line}
    return ParityLedger(
        probes=_probes(material),
        models=list(models.values()),
        transitions=[_transition(step, models[step.reference.name], material, ledger) for step in transitions(line)],
    )


def _probes(material: Material) -> LedgerProbes:
    told = [[probe.scored.ids, probe.scored.counted, probe.prompt] for probe in material.probes]
    return LedgerProbes(
        sha256=hashlib.sha256(json.dumps(told, separators=(",", ":")).encode()).hexdigest(),
        conversations=len(material.probes),
        tokens=sum(sum(probe.scored.counted) for probe in material.probes),
        rendered_sha256=companions.fixed_sha256(),
    )


def _model(member: Member, fingerprints: dict[Path, str]) -> LedgerModel:
    tokenizer_file = member.source / "tokenizer.json"
    template = load_tokenizer(member.source).chat_template
    return LedgerModel(
        name=member.name,
        weights_sha256=fingerprints[member.directory],
        adapter_sha256=fingerprints[member.adapter] if member.adapter is not None else None,
        trained_on_sha256=_trained_on(member.adapter) if member.adapter is not None else None,
        tokenizer_sha256=sha256_file(tokenizer_file) if tokenizer_file.is_file() else None,
        chat_template_sha256=hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None,
    )


def _trained_on(adapter: Path) -> str | None:
    """The trainer names the base in adapter_config.json by its fingerprint; an adapter from elsewhere names a hub id or a path.

    Weights that were trained as a whole name it in full_weights.json.

    Raises:
        InvalidData: that file cannot be read.
    """
    if full.is_full(adapter):
        return full.trained_on(adapter, str(adapter))
    try:
        named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidData(f"{adapter} is not an adapter: adapter_config.json cannot be read ({error}).", param="adapter") from None
    return named.removeprefix(_SHA256_NAME) if isinstance(named, str) and named.startswith(_SHA256_NAME) else None


def _transition(step: Transition, carrier: LedgerModel, material: Material, ledger: Ledger) -> LedgerTransition:
    reference, candidate = step.reference, step.candidate
    before, after = load_tokenizer(reference.source), load_tokenizer(candidate.source)
    probes = material.held_out.probes
    return LedgerTransition(
        name=step.name,
        reference=reference.name,
        candidate=candidate.name,
        tokenizer=companions.same_tokenizer(before, after, probes),
        chat_template=companions.same_chat_template(before, after, probes),
        generation_config=companions.same_generation_config(reference.directory, candidate.directory),
        adapter_base=None if carrier.trained_on_sha256 is None else float(carrier.trained_on_sha256 == carrier.weights_sha256),
        **_finite(_agreement(step, ledger)),
    )


def _agreement(step: Transition, ledger: Ledger) -> dict[str, float]:
    figures: dict[str, float] = {}
    agreement = ledger.agreement(step.reference.name, step.candidate.name)
    if agreement is not None:
        figures |= vars(agreement)
    if agreement is not None and step.origin is not None:
        changed = ledger.agreement(step.reference.name, step.origin.name)
        assert changed is not None  # one model with and without its adapter
        figures["recovered"] = parity.recovered(agreement.kl, changed.kl)
    from_base = ledger.agreement("base", step.candidate.name)
    if from_base is not None:
        figures["base_kl"] = from_base.kl
        figures["differs_from_base"] = float(from_base.kl >= parity.DIFFERS_KL)
    return figures


def _finite(figures: dict[str, float]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}
