"""Unsloth's eight-bit export: ``save_pretrained_merged(save_method="w8a8" | "int8" | "w8a16" | "fp8")``.

Unsloth writes the model in 16 bits and runs llm-compressor on it, which gives a compressed-tensors checkpoint. It patches
transformers when it is imported and loads a model of its own, so it works in a process of its own:
``python -m quantizer.backends.unsloth MODEL OUTPUT METHOD VERDICT``. Whatever it raises comes back word for word as the reason
why this way could not run. An llm-compressor that lives beside this environment is named to Unsloth by its own variable,
``UNSLOTH_COMPRESSED_QUANTIZE_PYTHONPATH``.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

from parampara.execution import library_process
from parampara.progress import Progress
from quantizer.backends import SchemeUnavailable, check_stop
from quantizer.checkpoint import copy_companions, read_config, stored_dtype


def write(model: Path, output: Path, *, save_method: str, scratch: Path, progress: Progress) -> None:
    """Have Unsloth quantize ``model`` into ``output``; ``scratch`` is a directory that it may fill and that is removed.

    Raises:
        SchemeUnavailable: Unsloth is not installed, or refused; the message is Unsloth's own.
        Preempted: asked to stop while it ran.
    """
    if importlib.util.find_spec("unsloth") is None:
        raise SchemeUnavailable("unsloth is not installed in this environment; see requirements/unsloth.txt.")
    scratch.mkdir(parents=True)
    try:
        _run(model, output, save_method=save_method, scratch=scratch, progress=progress)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    copy_companions(model, output)


def _run(model: Path, output: Path, *, save_method: str, scratch: Path, progress: Progress) -> None:
    verdict, log = scratch / "verdict.json", scratch / "unsloth.log"
    command = [sys.executable, "-m", "quantizer.backends.unsloth", str(model), str(output), save_method, str(verdict)]
    environment = {**os.environ, "UNSLOTH_COMPILE_LOCATION": str(scratch / "compiled"), "HF_HUB_OFFLINE": "1"}
    alive = partial(progress.step, 0, 1)
    code = library_process.run(command, cwd=scratch, environment=environment, log=log, check=check_stop, alive=alive)
    if code == 0:
        return
    if verdict.is_file():
        raise SchemeUnavailable(json.loads(verdict.read_text(encoding="utf-8"))["reason"])
    raise SchemeUnavailable(f"Unsloth's process ended with status {code}: {library_process.last_lines(log)}")


def _export(model: str, output: str, save_method: str) -> None:
    """The part that runs in Unsloth's own process."""
    unsloth = importlib.import_module("unsloth")  # first: it patches transformers and torch
    import torch

    if torch.cuda.is_available() and not os.environ.get("UNSLOTH_COMPRESSED_QUANTIZE_PYTHONPATH"):
        # Unsloth's own check, made before gigabytes of weights are loaded for nothing
        importlib.import_module("unsloth.save").install_llm_compressor(install_missing_dependencies=False)
    # in the stored type: left to itself, Unsloth takes bfloat16 where the GPU has it, which drops three bits of a float16 weight
    dtype = getattr(torch, stored_dtype(read_config(Path(model))))
    loaded, tokenizer = unsloth.FastLanguageModel.from_pretrained(model, dtype=dtype, load_in_4bit=False, local_files_only=True)
    merged = f"{Path(output).name}-16bit"
    loaded.save_pretrained_merged(merged, tokenizer, save_method=save_method, install_missing_dependencies=False)
    written = [path for path in Path.cwd().glob(f"{merged}-*") if (path / "config.json").is_file()]
    if len(written) != 1:
        raise RuntimeError(f"Unsloth said that it saved {save_method}, but wrote no such checkpoint.")
    os.rename(written[0], output)


def _child(model: str, output: str, save_method: str, verdict: str) -> int:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlives the stage
    try:
        _export(model, output, save_method)
    except Exception as error:  # noqa: BLE001 - a process boundary: the parent records what Unsloth raised
        Path(verdict).write_text(json.dumps({"reason": f"{type(error).__name__}: {error}"}), encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_child(*sys.argv[1:]))
