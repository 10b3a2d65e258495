"""Following progress.jsonl: nothing lost, nothing twice, whatever state a killed writer left the file in."""

from __future__ import annotations

from pathlib import Path

from parampara.execution.watch import ProgressBook, ProgressTail
from parampara.progress import JsonlProgress


def test_only_what_comes_after_the_start_is_read(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    JsonlProgress(path).phase("of an earlier attempt")
    with path.open("a") as file:
        file.write('{"type": "step", "t": 1, "ste')  # killed in the middle of a line
    tail = ProgressTail(path)
    progress = JsonlProgress(path)
    progress.phase("load")
    progress.step(1, 10, loss=float("nan"))
    assert [line["type"] for line in tail.read()] == ["phase", "step"]
    assert list(tail.read()) == []


def test_lines_that_lack_what_their_type_has_are_passed_over() -> None:
    book = ProgressBook({})
    for record in (
        {"type": "phase"},
        {"type": "step", "t": None, "step": 1, "total": 2},
        {"type": "step", "t": 1, "step": "x", "total": 2},
    ):
        book.fold(record)
    book.fold({"type": "event", "message": "m", "data": 3})
    assert (book.pending(), book.changed) == ([], False)


def test_half_a_line_waits_for_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    tail = ProgressTail(path)
    with path.open("a", buffering=1) as file:
        file.write('{"type": "pha')
        file.flush()
        assert list(tail.read()) == []
        file.write('se", "phase": "x"}\n')
        file.flush()
        assert list(tail.read()) == [{"type": "phase", "phase": "x"}]


def test_steps_between_flushes_become_one_event_with_every_point() -> None:
    book = ProgressBook({"best_step": 2, "crash_step": 2})
    book.fold({"type": "phase", "t": 0, "phase": "train"})
    for step in (1, 2, 3):
        book.fold({"type": "step", "t": 10.0 * step, "step": step, "total": 5, "metrics": {"loss": 1 / step}})
    book.fold({"type": "event", "t": 31, "level": "warn", "message": "slow", "data": {"n": 1}})
    events = book.pending()
    assert [(event["type"], event["level"]) for event in events] == [("message", "info"), ("metrics", "info"), ("message", "warn")]
    assert [point["step"] for point in events[1]["data"]["points"]] == [1, 2, 3]
    assert book.progress["eta_seconds"] == 20.0
    assert (book.progress["best_step"], book.progress["crash_step"], book.progress["phase"]) == (3, 2, "train")
    assert book.pending() == events  # until they are written
    book.written()
    assert book.pending() == []
    assert not book.changed
