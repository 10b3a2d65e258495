"""Models as the evaluator opens them: every format that the line writes, one type for models that are compared, and none left behind."""

from __future__ import annotations

import weakref
from pathlib import Path

from evaluator import parity
from evaluator.line import read_material
from evaluator.meter import Meter
from evaluator.models import loaded
from parampara.progress import SilentProgress
from tests.compressed import compress
from tests.evaluator.lines import Line


def test_a_compressed_tensors_checkpoint_opens_and_answers_like_its_parent(line: Line, tmp_path: Path) -> None:
    written = compress(line.root / "merged", tmp_path / "w8a8")
    probes = read_material(line.config()).probes
    recordings = []
    for name, directory in (("merged", line.root / "merged"), ("w8a8", written)):
        with loaded(name, directory) as model:
            meter = Meter(SilentProgress(), total=99)
            recordings.append(parity.record(model, probes, directory=tmp_path / "probes", max_new_tokens=4, meter=meter))
    agreement = parity.compare(*recordings, meter=Meter(SilentProgress(), total=99))
    assert 0 < agreement.kl < 1e-2
    assert agreement.top1 > 0.8


def test_the_weights_are_gone_after_the_block_although_its_name_is_still_there(line: Line) -> None:
    with loaded("base", line.root / "base") as model:
        weights = weakref.ref(model.model)
        assert weights() is not None
    assert model.name == "base"
    assert weights() is None
