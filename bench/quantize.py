"""The streaming W8A8 (or FP8) writer against llm-compressor's data-free path, at the shape of Llama 3.1 8B with random weights;
and merging on the way against PEFT's merge before it.

    python bench/quantize.py --peer-python /path/to/venv/bin/python [--layers 8] [--scheme w8a8] [--threads 1] [--workdir DIR]

The peer lives in an environment of its own (llmcompressor 0.14.0.1 with the torch, transformers and compressed-tensors of
constraints.txt): ``python -m venv V && V/bin/pip install llmcompressor==0.14.0.1 -c constraints.txt``. Leave
LLM_COMPRESSOR_LOG_DISABLED unset, with which that version does not start.

Each arm is a process of its own over the same parent, one after the other, imports included; what it costs is what the kernel
counted for it (wait4): peak resident memory, CPU-seconds (user + system), wall. Then the results are read back and the mean
squared error of the rounded weights against the parent is taken in float64. Everything is deleted at the end.

    ours       quantizer.backends.compressed.write
    peer       llmcompressor.model_free_ptq, the scheme W8A8 or FP8_DYNAMIC, without the embedding and the head
    one pass   write with two stacked adapters, merged on the way; the base's fingerprint, which is checked, included
    peft       twice PeftModel + merge_and_unload in the base's BF16, save_pretrained
    peer on it model_free_ptq on what PEFT has saved; peft and this one together are what one pass is held against

The parent of the last three is the merge in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from adapters import adapters_of, factors_of, make_adapters, merge_with_peft
from arms import goals_table, run
from llama import LLAMA_8B, make_model

if TYPE_CHECKING:
    from parampara.weights.model_files import ModelFiles

PRESETS = {"w8a8": "W8A8", "fp8": "FP8_DYNAMIC"}
PEER = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(sys.argv[1], sys.argv[2], scheme=sys.argv[3], ignore=["re:.*lm_head$", "re:.*embed_tokens$"], max_workers=1, device="cpu")
"""


def main() -> int:
    options = _options()
    if options.arm:
        ARMS[options.arm](options.workdir, options)
        return 0
    work = Path(tempfile.mkdtemp(prefix="quantize-", dir=options.workdir))
    figures: dict[str, dict[str, float]] = {}
    try:
        _arm("make", work, options)
        figures["ours"] = _arm("ours", work, options)
        figures["peer"] = _peer(work / "parent", work / "peer", options)
        figures["one pass"] = _arm("one-pass", work, options)
        figures["peft"] = _arm("peft", work, options)
        figures["peer on it"] = _peer(work / "peft", work / "two-steps", options)
        _arm("error", work, options)
        errors = json.loads((work / "error.json").read_text(encoding="utf-8"))
        print(_report(options, figures, errors))
    finally:
        shutil.rmtree(work)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="interpreter of the environment that llm-compressor is in")
    parser.add_argument("--scheme", choices=sorted(PRESETS), default="w8a8")
    parser.add_argument("--layers", type=int, default=8, help="of the 32; the peer holds a whole file in memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arm", choices=sorted(ARMS), help=argparse.SUPPRESS)
    return parser.parse_args()


def _arm(arm: str, work: Path, options: argparse.Namespace) -> dict[str, float]:
    same = ["--workdir", str(work), "--layers", str(options.layers), "--seed", str(options.seed), "--scheme", options.scheme]
    return run([sys.executable, __file__, "--arm", arm, *same], threads=options.threads)


def _peer(model: Path, output: Path, options: argparse.Namespace) -> dict[str, float]:
    return run([str(options.peer_python), "-c", PEER, str(model), str(output), PRESETS[options.scheme]], threads=options.threads)


def _make(work: Path, options: argparse.Namespace) -> None:
    config = {**LLAMA_8B, "num_hidden_layers": options.layers}
    make_model(work / "parent", config, seed=options.seed)
    make_adapters(work / "parent", work, config, seed=options.seed)


def _ours(work: Path, options: argparse.Namespace) -> None:
    from parampara.progress import SilentProgress
    from quantizer.backends.compressed import write

    write(work / "parent", work / "ours", scheme=options.scheme, progress=SilentProgress())


def _one_pass(work: Path, options: argparse.Namespace) -> None:
    from parampara.progress import SilentProgress
    from parampara.weights.merged import MergedModel
    from quantizer.backends.compressed import write

    with MergedModel(work / "parent", adapters_of(work)) as model:
        write(model, work / "one-pass", scheme=options.scheme, progress=SilentProgress())


def _peft(work: Path, options: argparse.Namespace) -> None:
    merge_with_peft(work / "parent", adapters_of(work), work / "peft")


def _error(work: Path, options: argparse.Namespace) -> None:
    """Mean squared error of the rounded weights of each arm: against the parent, or against its merge in float64."""
    import torch

    from parampara.weights.model_files import ModelFiles

    parent = ModelFiles(work / "parent")
    names = [name for name in parent.tensors if "_proj." in name]
    weights = sum(parent.tensors[name].elements for name in names)
    adapters = adapters_of(work)
    mse = {
        arm: sum(_squares(work / folder, parent, name, adapters=merged) for name in names) / weights
        for arm, (folder, merged) in {
            "ours": ("ours", []),
            "peer": ("peer", []),
            "one pass": ("one-pass", adapters),
            "peer on it": ("two-steps", adapters),
        }.items()
    }
    (work / "error.json").write_text(json.dumps({"weights": weights, "mse": mse, "torch": torch.__version__}), encoding="utf-8")


def _squares(written: Path, parent: ModelFiles, name: str, *, adapters: list[Path]) -> float:
    """Summed squared error of one tensor."""
    from parampara.weights.tensor_files import TensorFile

    home = {key: file for path in written.glob("*.safetensors") for file in [TensorFile(path)] for key in file.tensors}
    scales = home[f"{name}_scale"].read(f"{name}_scale").double()
    factors = factors_of(adapters, name)
    rows, total = parent.tensors[name].rows, 0.0
    for start in range(0, rows, 256):
        stop = min(start + 256, rows)
        restored = home[name].read_rows(name, start, stop).double() * scales[start:stop]
        expected = parent.home[name].read_rows(name, start, stop).double()
        if factors is not None:
            expected.addmm_(factors[0][start:stop], factors[1])
        total += float(restored.sub_(expected).square_().sum())
    for file in home.values():
        file.close()
    return total


ARMS = {"make": _make, "ours": _ours, "one-pass": _one_pass, "peft": _peft, "error": _error}


def _report(options: argparse.Namespace, figures: dict[str, dict[str, float]], errors: dict) -> str:
    ours, peer, one, mse = figures["ours"], figures["peer"], figures["one pass"], errors["mse"]
    two_steps = figures["peft"]["cpu"] + figures["peer on it"]["cpu"]
    found = {
        "peak RSS, GiB": (ours["rss_gib"], 1.0),
        "CPU-seconds, ours / peer": (ours["cpu"] / peer["cpu"], 0.5),
        "MSE, ours / peer": (mse["ours"] / mse["peer"], 0.92),
        "peak RSS of one pass, GiB": (one["rss_gib"], 1.0),
        "CPU-seconds, one pass / (peft + peer on it)": (one["cpu"] / two_steps, 1 / 3),
        "MSE, one pass / peer on it": (mse["one pass"] / mse["peer on it"], 0.92),
    }
    asked = 'import importlib.metadata as m; print(m.version("llmcompressor"), m.version("compressed-tensors"), m.version("torch"))'
    versions = subprocess.run([str(options.peer_python), "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    lines = [
        f"{options.scheme}, {options.layers} of 32 layers of Llama 3.1 8B ({errors['weights'] / 1e9:.2f} G weights rounded), BF16, "
        f"{options.threads} thread(s), seed {options.seed}",
        f"Python {platform.python_version()}, torch {errors['torch']}, transformers {version('transformers')}, "
        f"compressed-tensors {version('compressed-tensors')}; peer: llm-compressor {versions[0]}, compressed-tensors {versions[1]}, "
        f"torch {versions[2]}; {platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
        "",
        "| arm | CPU-seconds | peak RSS, GiB | wall, s | MSE of the weights |",
        "|---|---|---|---|---|",
        *(
            f"| {arm} | {f['cpu']:.1f} | {f['rss_gib']:.2f} | {f['wall']:.0f} | {format(mse[arm], '.4g') if arm in mse else ''} |"
            for arm, f in figures.items()
        ),
        "",
        *goals_table(found),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
