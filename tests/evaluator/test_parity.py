"""What is recorded of a model and how recordings are compared, with known values."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from evaluator import parity
from evaluator.evaluate import measure_line
from evaluator.ledger import Ledger
from evaluator.line import members, read_material
from evaluator.meter import Meter
from evaluator.models import common_dtype, load_tokenizer, loaded
from evaluator.perplexity import Loss, Scored, loss
from parampara.errors import InvalidData, Preempted
from parampara.execution import stop
from parampara.progress import SilentProgress
from parampara.schemas.stages import EvaluateConfig
from tests.evaluator.lines import Line
from tests.tiny_models import make_model

METER = Meter(SilentProgress(), total=9999)


def record(name: str, directory: Path, config: EvaluateConfig, scratch: Path, *, dtype: Any = None) -> parity.Recording:
    probes = read_material(config).probes
    with loaded(name, directory, **({} if dtype is None else {"dtype": dtype})) as model:
        return parity.record(model, probes, directory=scratch, max_new_tokens=4, meter=METER)


def test_a_model_agrees_with_itself(line: Line, tmp_path: Path) -> None:
    first = record("first", line.root / "merged", line.config(), tmp_path)
    second = record("second", line.root / "merged", line.config(), tmp_path)
    assert parity.compare(first, second, meter=METER) == parity.Agreement(
        kl=0.0, top1=1.0, greedy_match=1.0, greedy_prefix=1.0, perplexity_change=0.0
    )


def test_kl_is_the_hand_computed_one(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    before, after = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    recordings = []
    for name, probabilities, greedy in (("before", before, [[1, 2, 3]]), ("after", after, [[1, 9, 3]])):
        (tmp_path / name).mkdir()
        save_file({"log_probs": probabilities.log()}, tmp_path / name / "00000.safetensors")
        nats = -float(probabilities[:, 0].log().sum())  # as if token 0 followed twice
        recordings.append(parity.Recording(name=name, directory=tmp_path / name, greedy=greedy, loss=Loss(nats=nats, tokens=2)))
    agreement = parity.compare(*recordings, meter=METER)
    assert agreement.kl == pytest.approx((0.5 * math.log(2) + 0.25 * math.log(0.5)) / 2)
    assert (agreement.top1, agreement.greedy_match) == (0.5, 0.0)
    assert agreement.greedy_prefix == pytest.approx(1 / 3)
    assert agreement.perplexity_change == pytest.approx(math.sqrt(0.5 / 0.25) - 1)


def test_the_loss_of_a_recording_is_that_of_its_tokens(line: Line, tmp_path: Path) -> None:
    probes = read_material(line.config()).probes
    with loaded("base", line.root / "base") as model:
        recording = parity.record(model, probes, directory=tmp_path, max_new_tokens=1, meter=METER)
        shifted = [Scored(probe.scored.ids, [False, *probe.scored.counted[:-1]]) for probe in probes]  # a loss belongs to the token after
        expected = loss(model, shifted, METER)
    assert (recording.loss.tokens, recording.loss.nats) == (expected.tokens, pytest.approx(expected.nats, rel=1e-5))


def test_a_perturbed_model_differs(line: Line, tmp_path: Path) -> None:
    base = record("base", line.root / "base", line.config(), tmp_path)
    merged = record("merged", line.root / "merged", line.config(), tmp_path)
    agreement = parity.compare(base, merged, meter=METER)
    assert agreement.kl > 1e-3
    assert agreement.top1 < 1


def test_models_of_different_vocabularies_cannot_be_compared(line: Line, tmp_path: Path) -> None:
    stranger = make_model(tmp_path / "stranger", vocab_size=600)
    first = record("base", line.root / "base", line.config(), tmp_path / "probes")
    second = record("stranger", stranger, line.config(), tmp_path / "probes")
    with pytest.raises(InvalidData, match="vocabulary of 600"):
        parity.compare(first, second, meter=METER)


@pytest.mark.parametrize(
    ("kl", "origin", "expected"), [(0.0, 0.2, 1.0), (0.2, 0.2, 0.0), (0.05, 0.2, 0.75), (0.0, 0.0, 1.0), (0.2, 0.0, 0.0)]
)
def test_recovered(kl: float, origin: float, expected: float) -> None:
    assert parity.recovered(kl, origin) == pytest.approx(expected)


def test_answers_and_the_end_of_prompts_are_recorded_and_no_more(line: Line) -> None:
    tokenizer = load_tokenizer(line.root / "base")
    conversation = [{"role": "user", "content": "Ketu rules. " * 100}, {"role": "assistant", "content": "Venus rules. " * 200}]
    probe = parity.make_probes(tokenizer, [conversation], max_tokens=4096)[0]
    assert probe.prompt > 200
    assert probe.scored.counted == [False] * (probe.prompt - 16) + [True] * (16 + 256)
    cut = parity.make_probes(tokenizer, [conversation], max_tokens=probe.prompt + 4)[0]
    assert (len(cut.scored.ids), sum(cut.scored.counted)) == (probe.prompt + 4, 20)


class Watched(Ledger):
    """Notes which recordings lie on the disk after each model."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kept: list[list[str]] = []
        self.most = 0

    def add(self, recording: parity.Recording) -> None:
        self.most = max(self.most, len(list(recording.directory.parent.iterdir())))
        super().add(recording)
        self.kept.append(sorted(path.name for path in recording.directory.parent.iterdir()))


def test_no_recording_is_kept_longer_than_needed(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an 8B model each takes gigabytes."""
    monkeypatch.setattr("evaluator.evaluate.Ledger", Watched)
    material, config = read_material(line.config()), line.config()
    _, told = measure_line(config, members(config), material, scratch=tmp_path, meter=METER)
    assert isinstance(told, Watched)
    assert told.most == 3
    assert told.kept == [["base"], ["base", "dapt_adapter"], ["base", "dapt"], ["base", "sft_adapter"], ["base", "sft"], []]


def test_a_wish_to_stop_is_seen_between_probes(line: Line, tmp_path: Path) -> None:
    recording = record("base", line.root / "base", line.config(), tmp_path)
    stop.request()
    try:
        with pytest.raises(Preempted):
            parity.compare(recording, recording, meter=METER)
    finally:
        stop.clear()


def test_a_merge_that_did_nothing_is_caught_although_the_base_is_stored_in_another_type(line: Line, tmp_path: Path) -> None:
    """A base in bfloat16 and its copy in float16, each run as it is stored, differ by rounding alone as a trained model may."""
    import torch
    from transformers import AutoModelForCausalLM

    shipped = Path(__file__).parents[2] / "examples" / "kp" / "base"
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        shutil.copytree(shipped, tmp_path / name)
        model: Any = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.bfloat16)
        model.to(dtype).save_pretrained(tmp_path / name)
    config = line.config(base=tmp_path / "bf16", merged=tmp_path / "fp16")

    def change(**dtypes: Any) -> float:
        recordings = [record(name, tmp_path / name, config, tmp_path / "probes", dtype=dtype) for name, dtype in dtypes.items()]
        return parity.compare(*recordings, meter=METER).kl

    assert change(bf16=torch.bfloat16, fp16=torch.float16) > 1e-5
    common = common_dtype(config.merged, gpu=True)
    assert common == torch.float16
    assert change(bf16=common, fp16=common) < parity.DIFFERS_KL / 100
    assert common_dtype(config.merged, gpu=False) == torch.float32
