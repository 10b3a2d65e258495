"""Print what every built image adds to its base image, as a table: ``make image-sizes``.

``docker images`` counts a layer in each image that has it; here a layer shared with other images of the platform is told apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

BASE = "python:3.11-slim-bookworm"
IMAGES = (
    "control-plane",
    "gateway",
    "ingestor",
    "deployer",
    "embedder",
    "merger",
    "evaluator",
    "quantizer",
    "trainer",
    "model-server:cpu",
)


def main() -> int:
    base = len(_layers(BASE))
    added = {image: _layers(f"parampara/{image}")[base:] for image in IMAGES}
    holders = Counter(layer for layers in added.values() for layer, _ in layers)
    print("| image | MB | of it shared | of it its own code |")
    print("|---|---|---|---|")
    for image, layers in added.items():
        shared = sum(size for layer, size in layers if holders[layer] > 1)
        print(f"| {image} | {_mb(sum(size for _, size in layers))} | {_mb(shared)} | {_mb(_code(image), digits=1)} |")
    distinct = {layer: size for layers in added.values() for layer, size in layers}
    print(f"| all together on one disk | {_mb(sum(distinct.values()))} | | |")
    return 0


def _layers(image: str) -> list[tuple[str, int]]:
    """``(digest, bytes)`` of every layer that holds files, lowest first."""
    digests = json.loads(_docker("image", "inspect", image, "--format", "{{json .RootFS.Layers}}"))
    sizes = [int(size) for size in _docker("history", "--human=false", "--format", "{{.Size}}", image).split()]
    filled = [size for size in reversed(sizes) if size]
    if len(filled) != len(digests):  # a layer without files has a digest too
        filled = [size for size, text in reversed(_steps(image)) if size or text.startswith(("WORKDIR", "RUN", "COPY"))]
    return list(zip(digests, filled, strict=True))


def _steps(image: str) -> list[tuple[int, str]]:
    lines = _docker("history", "--human=false", "--no-trunc", "--format", "{{.Size}}\t{{.CreatedBy}}", image).splitlines()
    return [(int(size), text) for size, _, text in (line.partition("\t") for line in lines)]


def _code(image: str) -> int:
    """The topmost copied environment: what a change of code replaces."""
    return next(size for size, text in _steps(f"parampara/{image}") if text.startswith("COPY /opt/venv"))


def _mb(size: int, digits: int = 0) -> str:
    return f"{size / 1e6:,.{digits}f}"


def _docker(*words: str) -> str:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
