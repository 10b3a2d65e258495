"""The merge against PEFT's ``merge_and_unload`` and against a plain copy, at the shape of Llama 3.1 8B with random weights.

    python bench/merge.py [--layers 32] [--threads N] [--workdir DIR] [--keep]

Each arm is a process of its own over the same base and the same two adapters, one after the other; what it costs is what the
kernel counted for it (wait4): peak resident memory, CPU-seconds (user + system), wall. Every arm starts with the base out of the
page cache and ends with its output synced.

    copy   the base read and written once: the floor of any merge on this disk
    ours   python -m merger's function, hashing base and output on the way, as always
    peft   from_pretrained, twice PeftModel + merge_and_unload, save_pretrained

The divergence is measured on a small model of the same family, all logits in float64: KL(reference || merged), where the
reference merges in float64. PEFT is given bfloat16 (as the base is published), and float16 and float32 for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from adapters import adapters_of, make_adapters, merge_in_double, merge_with_peft
from arms import goals_table, run
from llama import LLAMA_8B, make_model

SMALL = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 4096}
GOALS = {"rss_gib": 1.0, "cpu_ratio": 0.5, "wall_ratio": 1.5, "kl_ratio": 1 / 50}


def main() -> int:
    options = _options()
    if options.arm:
        ARMS[options.arm](options.workdir, options)
        return 0
    options.workdir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="merge-", dir=options.workdir))
    try:
        _run("make", work, options)
        figures = {arm: _measured(arm, work, options) for arm in ("copy", "ours", "peft")}
        shutil.rmtree(work / "base")
        _run("divergence", work, options)
        print(_report(options, figures, json.loads((work / "divergence.json").read_text(encoding="utf-8"))))
    finally:
        if not options.keep:
            shutil.rmtree(work)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of the 32; PEFT needs the whole model in memory, the disk three times")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--keep", action="store_true", help="leave the files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arm", choices=sorted(ARMS), help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(arm: str, work: Path, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--arm", arm, "--workdir", str(work), "--layers", str(options.layers), "--seed", str(options.seed)]
    return run([*command, "--threads", str(options.threads)], threads=options.threads)


def _measured(arm: str, work: Path, options: argparse.Namespace) -> dict[str, float]:
    for shard in (work / "base").glob("*.safetensors"):
        with shard.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    figures = _run(arm, work, options)
    shutil.rmtree(work / arm, ignore_errors=True)
    return figures


def _make(work: Path, options: argparse.Namespace) -> None:
    """A bfloat16 base of ``--layers`` layers and two adapters trained, so it is recorded, one after the other."""
    config = {**LLAMA_8B, "num_hidden_layers": options.layers}
    make_model(work / "base", config, seed=options.seed)
    make_adapters(work / "base", work, config, seed=options.seed)


def _copy(work: Path, options: argparse.Namespace) -> None:
    (work / "copy").mkdir()
    buffer = memoryview(bytearray(8 << 20))
    for shard in sorted((work / "base").glob("*.safetensors")):
        with shard.open("rb", buffering=0) as source, (work / "copy" / shard.name).open("wb", buffering=0) as target:
            while count := source.readinto(buffer):
                target.write(buffer[:count])
            os.fsync(target.fileno())


def _ours(work: Path, options: argparse.Namespace) -> None:
    from merger.merge import run as merge
    from parampara.progress import SilentProgress
    from parampara.schemas.stages import MergeConfig

    config = MergeConfig(model=work / "base", adapters=adapters_of(work))
    merge(config, workdir=work / "ours", progress=SilentProgress())


def _peft(work: Path, options: argparse.Namespace, *, dtype: str = "auto") -> None:
    merge_with_peft(work / "base", adapters_of(work), work / "peft", dtype=dtype)


def _divergence(work: Path, options: argparse.Namespace) -> None:
    """KL to the float64 merge of a small model, in nats per token: ours, and PEFT's in three dtypes."""
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    small, config = work / "small", {**SMALL, "num_hidden_layers": 8}
    make_model(small / "base", config, seed=options.seed, deviation=0.05)
    adapters = make_adapters(small / "base", small, config, seed=options.seed)
    reference = merge_in_double(load_file(str(small / "base" / "model.safetensors")), adapters)
    ids = torch.randint(0, config["vocab_size"], (4, 64), generator=torch.Generator().manual_seed(options.seed))

    def logits(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        model = LlamaForCausalLM(LlamaConfig(**config, tie_word_embeddings=False)).double().eval()  # type: ignore[arg-type]
        model.load_state_dict({name: tensor.double() for name, tensor in weights.items()})
        with torch.inference_mode():
            return model(ids).logits.log_softmax(-1)

    expected = logits(reference)
    _ours(small, options)
    merged = {"ours, float16": load_file(str(small / "ours" / "output" / "model.safetensors"))}
    for dtype in ("bfloat16", "float16", "float32"):
        _peft(small, options, dtype=dtype)
        weights = load_file(str(small / "peft" / "model.safetensors"))
        merged[f"peft, {dtype}" + (" saved as float16" if dtype == "float32" else "")] = {
            name: tensor.half() if dtype == "float32" else tensor for name, tensor in weights.items()
        }
    kl = {name: float((expected.exp() * (expected - logits(weights))).sum(-1).mean()) for name, weights in merged.items()}
    (work / "divergence.json").write_text(json.dumps(kl), encoding="utf-8")


ARMS = {"make": _make, "copy": _copy, "ours": _ours, "peft": _peft, "divergence": _divergence}


def _report(options: argparse.Namespace, figures: dict[str, dict[str, float]], kl: dict[str, float]) -> str:
    ours, peft, copy = figures["ours"], figures["peft"], figures["copy"]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    ratios = {
        "peak memory, GiB": (ours["rss_gib"], GOALS["rss_gib"]),
        "CPU-seconds / PEFT's": (ours["cpu"] / peft["cpu"], GOALS["cpu_ratio"]),
        "wall / copy's": (ours["wall"] / copy["wall"], GOALS["wall_ratio"]),
        "KL / PEFT's in bfloat16": (kl["ours, float16"] / kl["peft, bfloat16"], GOALS["kl_ratio"]),
    }
    lines = [
        f"{options.layers} of 32 layers, {options.threads} threads, seed {options.seed}; {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, load {load}; Python {platform.python_version()}, {versions}",
        "",
        "| arm | peak memory, GiB | CPU-seconds | wall, s |",
        "|---|---|---|---|",
        *(f"| {arm} | {f['rss_gib']:.2f} | {f['cpu']:.1f} | {f['wall']:.1f} |" for arm, f in figures.items()),
        "",
        "| merged by | KL to the float64 merge, nats |",
        "|---|---|",
        *(f"| {name} | {value:.2e} |" for name, value in kl.items()),
        "",
        *goals_table(ratios),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
