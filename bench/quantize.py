"""The streaming W8A8 (or FP8) writer against llm-compressor's data-free path, at the shape of Llama 3.1 8B with random weights.

    python bench/quantize.py --peer-python /path/to/venv/bin/python [--layers 8] [--scheme w8a8] [--threads 1] [--workdir DIR]

The peer lives in an environment of its own (llmcompressor 0.14.0.1 with the torch, transformers and compressed-tensors of
constraints.txt): ``python -m venv V && V/bin/pip install llmcompressor==0.14.0.1 -c constraints.txt``. Leave
LLM_COMPRESSOR_LOG_DISABLED unset, with which that version does not start.

Each arm is a process of its own over the same parent, one after the other, imports included; what it costs is what the kernel
counted for it (wait4): peak resident memory, CPU-seconds (user + system), wall. Then both results are read back and the mean
squared error of the rounded weights against the parent is taken in float64. Everything is deleted at the end.

    ours   quantizer.backends.compressed.write
    peer   llmcompressor.model_free_ptq, the scheme W8A8 or FP8_DYNAMIC, without the embedding and the head
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

from arms import goals_table, run
from llama import LLAMA_8B, make_model

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
        for arm in ("make", "ours"):
            figures[arm] = run([sys.executable, __file__, "--arm", arm, *_same(work, options)], threads=options.threads)
        peer = [str(options.peer_python), "-c", PEER, str(work / "parent"), str(work / "peer"), PRESETS[options.scheme]]
        figures["peer"] = run(peer, threads=options.threads)
        run([sys.executable, __file__, "--arm", "error", *_same(work, options)], threads=options.threads)
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


def _same(work: Path, options: argparse.Namespace) -> list[str]:
    return ["--workdir", str(work), "--layers", str(options.layers), "--seed", str(options.seed), "--scheme", options.scheme]


def _make(work: Path, options: argparse.Namespace) -> None:
    make_model(work / "parent", {**LLAMA_8B, "num_hidden_layers": options.layers}, seed=options.seed)


def _ours(work: Path, options: argparse.Namespace) -> None:
    from parampara.progress import SilentProgress
    from quantizer.backends.compressed import write

    write(work / "parent", work / "ours", scheme=options.scheme, progress=SilentProgress())


def _error(work: Path, options: argparse.Namespace) -> None:
    """Mean squared error of the rounded weights, of each arm, and of each arm's largest."""
    import torch

    from parampara.weights.model_files import ModelFiles
    from parampara.weights.tensor_files import TensorFile

    parent = ModelFiles(work / "parent")
    names = [name for name in parent.tensors if "_proj." in name]
    squares = dict.fromkeys(("ours", "peer"), 0.0)
    for arm in squares:
        home = {name: file for path in (work / arm).glob("*.safetensors") for file in [TensorFile(path)] for name in file.tensors}
        for name in names:
            scales = home[f"{name}_scale"].read(f"{name}_scale").double()
            rows = parent.tensors[name].rows
            for start in range(0, rows, 256):
                chunk = slice(start, min(start + 256, rows))
                restored = home[name].read_rows(name, chunk.start, chunk.stop).double() * scales[chunk]
                squares[arm] += float((restored - parent.home[name].read_rows(name, chunk.start, chunk.stop)).square_().sum())
    weights = sum(parent.tensors[name].elements for name in names)
    record = {"weights": weights, "mse": {arm: square / weights for arm, square in squares.items()}, "torch": torch.__version__}
    (work / "error.json").write_text(json.dumps(record), encoding="utf-8")


ARMS = {"make": _make, "ours": _ours, "error": _error}


def _report(options: argparse.Namespace, figures: dict[str, dict[str, float]], errors: dict) -> str:
    ours, peer, mse = figures["ours"], figures["peer"], errors["mse"]
    found = {
        "peak RSS, GiB": (ours["rss_gib"], 1.0),
        "CPU-seconds, ours / peer": (ours["cpu"] / peer["cpu"], 0.5),
        "MSE, ours / peer": (mse["ours"] / mse["peer"], 0.92),
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
            f"| {arm} | {f['cpu']:.1f} | {f['rss_gib']:.2f} | {f['wall']:.0f} | {mse[arm]:.4g} |"
            for arm, f in figures.items()
            if arm in mse
        ),
        "",
        *goals_table(found),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
