"""The reason that is told when vLLM does not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_server.failure import log_tail, reason

ENGINE_LOG = """\
(EngineCore pid=77) ERROR 11-23 08:42:31 [core.py:1131] EngineCore failed to start.
(EngineCore pid=77) ERROR 11-23 08:42:31 [core.py:1131] Traceback (most recent call last):
(EngineCore pid=77) ERROR 11-23 08:42:31 [core.py:1131]   File "core.py", line 1100, in run_engine_core
(EngineCore pid=77) ERROR 11-23 08:42:31 [core.py:1131] ValueError: the tensor lm_head.weight has shape [10, 4]
(APIServer pid=70) Traceback (most recent call last):
(APIServer pid=70) RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_cause_is_told_and_not_its_consequence() -> None:
    assert reason(ENGINE_LOG) == "ValueError: the tensor lm_head.weight has shape [10, 4]"


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            "pydantic_core.ValidationError: 1 error\nValueError: Unknown quantization method: bitsandbytes. Must be",
            "install vllm-bnb-plugin",
        ),
        ("OSError: [Errno 98] Address already in use", "PARAMPARA_MODEL_SERVER__VLLM_PORT"),
        ("ValueError: No available memory for the cache blocks.", "max_model_len"),
        ("api_server.py: error: unrecognized arguments: --wrong", "unrecognized arguments: --wrong"),
        ("something odd\nlast line", "last line"),
        ("", "nothing"),
    ],
)
def test_advice_follows_known_reasons(log: str, words: str) -> None:
    assert words in reason(log)


def test_tail_begins_where_this_start_began(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text("old\n")
    start = log.stat().st_size
    log.write_text("old\nnew 1\nnew 2\n")
    assert log_tail(log, start=start) == "new 1\nnew 2"
    assert log_tail(log, start=start, lines=1) == "new 2"
    assert log_tail(tmp_path / "none") == ""
