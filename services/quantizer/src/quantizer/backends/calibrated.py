"""W8A8 with calibration, by llm-compressor: GPTQ (Frantar et al. 2022, arXiv 2210.17323), and SmoothQuant before it (Xiao et al.
2022, arXiv 2211.10438).

The rows that the model was trained on tell it which activations occur; held-out ones are left to the gate. llm-compressor lives in
an environment of its own, ``.venv-llmcompressor`` beside the platform's (``LLMCOMPRESSOR_PYTHON`` names another Python), because
its pins are not the platform's. ``calibrated_child.py`` is what runs there.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

from parampara.datasets.chat import conversation_of
from parampara.datasets.held_out import trained_rows
from parampara.datasets.scored import answer_sequences
from parampara.execution import library_process
from parampara.progress import Progress
from parampara.schemas.stages import QuantizeConfig
from quantizer.backends import SchemeUnavailable, check_stop
from quantizer.checkpoint import copy_companions, read_config, stored_dtype

CalibratedScheme = Literal["gptq", "smoothquant"]


def write(config: QuantizeConfig, output: Path, *, scheme: CalibratedScheme, scratch: Path, progress: Progress) -> None:
    """Have llm-compressor quantize ``config.model`` into ``output``; ``scratch`` is a directory that it may fill and that is removed.

    Raises:
        SchemeUnavailable: there is no environment, no training rows to calibrate on, or llm-compressor failed: the end of its log.
        InvalidData: the rows are faulty.
        Preempted: asked to stop while it ran.
    """
    python = find_python()
    rows = calibration_rows(config)
    scratch.mkdir(parents=True)
    try:
        request = {
            "model": str(config.model),
            "output": str(output),
            "dtype": stored_dtype(read_config(config.model)),
            "smooth": scheme == "smoothquant",
            "rows": rows,
        }
        (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [str(python), "-I", str(Path(__file__).with_name("calibrated_child.py")), str(scratch / "request.json")]
        log = scratch / "llmcompressor.log"
        # not among what is kept: LLM_COMPRESSOR_LOG_DISABLED=true, with which 0.14.0.1 dies
        environment = library_process.environment() | {"HF_HUB_OFFLINE": "1"}
        alive = partial(progress.step, 0, 1)
        if code := library_process.run(command, cwd=scratch, environment=environment, log=log, check=check_stop, alive=alive):
            raise SchemeUnavailable(f"llm-compressor's process ended with status {code}: {library_process.last_lines(log)}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    copy_companions(config.model, output)


def find_python() -> Path:
    """The Python of llm-compressor's environment.

    Raises:
        SchemeUnavailable: there is none; with the command that makes it.
    """
    python = Path(os.environ.get("LLMCOMPRESSOR_PYTHON") or Path(sys.prefix).parent / ".venv-llmcompressor" / "bin" / "python")
    if not python.is_file():
        raise SchemeUnavailable(
            f"llm-compressor's environment is not here ({python}); make it: python3 scripts/setup.py --only llmcompressor"
        )
    return python


def calibration_rows(config: QuantizeConfig) -> list[list[int]]:
    """Token ids of at most ``params.calibration_rows`` rows that SFT trained on, rendered as it saw them.

    Raises:
        SchemeUnavailable: the stage was given no rows, or all are too long.
    """
    from transformers import AutoTokenizer

    if config.qa is None:
        raise SchemeUnavailable("Calibration needs the rows that the model was trained on, and the stage was given none (qa).")
    params = config.sft_params
    tokenizer: Any = AutoTokenizer.from_pretrained(config.model, local_files_only=True)
    rows = trained_rows(config.qa, params, limit=config.params.calibration_rows, seed=config.seed)
    longest = min(params.train.max_seq_length, read_config(config.model).get("max_position_embeddings", 1 << 20))
    conversations = [conversation_of(row, system_prompt=params.system_prompt) for row in rows]
    sequences = answer_sequences(tokenizer, conversations, max_tokens=longest)
    if not sequences:
        raise SchemeUnavailable(f"No training row has its answer within {longest} tokens: there is nothing to calibrate on.")
    return [sequence.ids for sequence in sequences]
