"""The model card: README.md with the hub's front matter (https://huggingface.co/docs/hub/model-cards), ready to lie beside the weights."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from parampara.schemas.ledger import ParityLedger
from parampara.schemas.metrics import last_merged
from parampara.schemas.stages import EvaluateConfig, EvaluateResult

_RESULTS = {
    "exact": ("exact_match", "Exact answers", "held-out questions"),
    "validation_loss": ("loss", "Loss of the reference answers, nats per token", "held-out questions"),
    "perplexity": ("perplexity", "Perplexity", "held-out books"),
}
"""Metric of the served model to type, name and data set as the hub shows them."""


def model_card(config: EvaluateConfig, result: EvaluateResult, ledger: ParityLedger) -> str:
    """Text of the card: front matter with the results of the served model, then how it was made and what was measured."""
    served = "quantized" if config.quantized is not None else last_merged([model.name for model in ledger.models])
    base = config.base_model or "base"
    data = ModelCardData(
        base_model=config.base_model or None,
        library_name="vllm" if served == "quantized" else "transformers",
        pipeline_tag="text-generation",
        license=_license(config.base),
        tags=[
            "parampara",
            *(["lora", "merged"] if _adapted(config) else []),
            *(["dpo"] if config.dpo_adapter is not None else []),
            *(["8-bit"] if served == "quantized" else []),
        ],
        model_name=f"{base.rpartition('/')[2]}-expert",
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out",
                dataset_name=dataset,
                metric_type=kind,
                metric_name=name,
                metric_value=round(result.metrics[f"{metric}.{served}"], 6),
            )
            for metric, (kind, name, dataset) in _RESULTS.items()
            if f"{metric}.{served}" in result.metrics
        ],
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_body(base, _method(config), served, result, ledger))


def _adapted(config: EvaluateConfig) -> bool:
    """Whether any stage trained an adapter; without one every weight was trained."""
    return config.dapt_params.lora is not None or config.sft_params.lora is not None or config.dpo_adapter is not None


def _method(config: EvaluateConfig) -> str:
    stages = {"domain-adaptive pretraining": config.dapt_params.lora, "supervised fine-tuning": config.sft_params.lora}
    if config.dpo_adapter is not None:
        stages["direct preference optimization"] = config.dpo_params.lora
    ways = {stage: "of every weight" if lora is None else "by LoRA" for stage, lora in stages.items()}
    if len(set(ways.values())) == 1:
        shared = f", {'both' if len(ways) == 2 else 'each'} {ways.popitem()[1]}"
        names = list(stages)
    else:
        shared, names = "", [f"{stage} {way}" for stage, way in ways.items()]
    text = f"{', '.join(names[:-1])} and {names[-1]}{shared}" + (", merged into the base" if _adapted(config) else "")
    return text[0].upper() + text[1:]


def _body(base: str, method: str, served: str, result: EvaluateResult, ledger: ParityLedger) -> list[str]:
    model = next(model for model in ledger.models if model.name == served)
    shown = ("kl", "top1", "recovered", "perplexity_change", "chat_template")
    parity = [step.model_dump() for step in ledger.transitions]
    return [
        f"# A domain expert on {base}",
        "",
        method + (" and quantized to eight bits." if served == "quantized" else "."),
        f"Weights `sha256:{model.weights_sha256}`.",
        *_preferences(result.metrics),
        "",
        f"## Gates: {result.decision}",
        "",
        *_table(
            ["metric", "value", "min", "max", "met"],
            [[gate.metric, gate.value, gate.min, gate.max, "yes" if gate.passed else f"no ({gate.action})"] for gate in result.gates],
        ),
        "",
        "## Parity with the model before it",
        "",
        *_table(["transition", *shown], [[step["name"], *(step[name] for name in shown)] for step in parity]),
        "",
    ]


def _preferences(metrics: dict[str, float]) -> list[str]:
    """What was learnt from preferences, where there were any and the adapter says so."""
    if "dpo.reward_accuracy" not in metrics:
        return []
    margin = f", by {metrics['dpo.reward_margin']:.4g} on average" if "dpo.reward_margin" in metrics else ""
    return [f"Of held-out pairs of answers, the better one gained more in {metrics['dpo.reward_accuracy']:.1%}{margin}."]


def _table(head: list[str], rows: list[list[object]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]]


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _license(base: Path) -> str | None:
    """What the base's own card says; None where it has none or says nothing."""
    path = base / "README.md"
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path).data.to_dict().get("license")
    except (ValueError, OSError):
        return None
