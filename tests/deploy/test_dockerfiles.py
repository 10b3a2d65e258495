"""Every service has an image that builds from files that exist, runs without root and says whether it is healthy."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.deployment_files import ROOT, instructions

DOCKERFILES = sorted((ROOT / "docker").glob("*/Dockerfile*"))
SERVICES = sorted(path.name for path in (ROOT / "services").iterdir() if (path / "pyproject.toml").is_file())
WITHOUT_TORCH = {"control_plane", "gateway", "ingestor", "model_server"}

each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: f"{path.parent.name}-{path.name}")


def test_every_service_but_standalone_has_an_image() -> None:
    assert {path.parent.name for path in DOCKERFILES} == set(SERVICES) - {"standalone"}
    assert (ROOT / "docker/model_server/Dockerfile.gpu").is_file()


@each_dockerfile
def test_copied_sources_exist_and_reach_the_builder(dockerfile: Path) -> None:
    for source in _copied(dockerfile):
        assert (ROOT / source).exists(), source
        assert _in_context(source), f".dockerignore keeps {source} from the builder"


@each_dockerfile
def test_no_frontend_image_is_pulled(dockerfile: Path) -> None:
    assert not re.search(r"^#\s*syntax\s*=", dockerfile.read_text(encoding="utf-8"), re.MULTILINE | re.IGNORECASE)


@each_dockerfile
def test_every_final_stage_runs_without_root_and_checks_its_health(dockerfile: Path) -> None:
    for name, stage in _final_stages(dockerfile).items():
        users = [rest for instruction, rest in stage if instruction == "USER"]
        assert users[-1:] == ["10001:10001"], name
        assert any(instruction == "HEALTHCHECK" for instruction, _ in stage), name
        assert any(instruction == "CMD" and rest.startswith("[") for instruction, rest in stage), (
            f"{name}: signals reach an exec-form CMD only"
        )


@each_dockerfile
def test_libraries_are_constrained(dockerfile: Path) -> None:
    for instruction, rest in instructions(dockerfile):
        if instruction == "RUN" and re.search(r"install\b(?!.*--no-deps).* -r (?!.*vllm)", rest):
            assert "-c constraints.txt" in rest, rest


@each_dockerfile
def test_torch_is_the_cpu_build_unless_asked_and_the_constrained_version(dockerfile: Path) -> None:
    text = "\n".join(f"{instruction} {rest}" for instruction, rest in instructions(dockerfile))
    pinned = re.findall(r"\btorch==(\S+)", text)
    wanted = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert wanted is not None
    assert set(pinned) <= {wanted[1]}
    if pinned:
        assert "ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu" in text


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_carries_torch_that_does_not_need_it(service: str) -> None:
    names = {re.split(r"[<>=\[ ]", name)[0] for name in _dependencies("shared", f"services/{service}")}
    expected = service not in WITHOUT_TORCH | {"standalone"}
    assert ("torch" in names) == expected


def test_dependencies_leave_out_our_own_packages() -> None:
    names = _dependencies("shared", "services/gateway")
    assert any(name.startswith("aiohttp") for name in names)
    assert any(name.startswith("sqlalchemy") for name in names)
    assert not any(name.startswith("parampara") for name in names)


@pytest.mark.parametrize("service", sorted(set(SERVICES) - {"standalone"}))
def test_an_image_installs_the_service_of_its_folder(service: str) -> None:
    for dockerfile in (ROOT / "docker" / service).glob("Dockerfile*"):
        assert f"services/{service}" in _copied(dockerfile), dockerfile


def test_the_health_check_tells_a_good_answer_from_a_bad_one() -> None:
    script = ROOT / "docker/healthcheck.py"
    result = subprocess.run([sys.executable, script, "http://127.0.0.1:9/readyz"], capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode == 1
    assert "127.0.0.1:9" in result.stdout


def _dependencies(*folders: str) -> list[str]:
    command = [sys.executable, ROOT / "docker/dependencies.py", *folders]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def _copied(dockerfile: Path) -> list[str]:
    """Sources of COPY that come from the build context."""
    sources = []
    for instruction, rest in instructions(dockerfile):
        words = shlex.split(rest)
        if instruction == "COPY" and not any(word.startswith("--from") for word in words):
            sources += [word.rstrip("/") for word in words[:-1] if not word.startswith("--")]
    return sources


def _final_stages(dockerfile: Path) -> dict[str, list[tuple[str, str]]]:
    """Stages that no later stage builds on or copies from: the ones that become images."""
    stages: dict[str, list[tuple[str, str]]] = {}
    used: set[str] = set()
    name = ""
    for instruction, rest in instructions(dockerfile):
        words = rest.split()
        if instruction == "FROM":
            name = words[2] if len(words) == 3 else f"stage {len(stages)}"
            stages[name] = []
            used.add(words[0])
        elif name:
            stages[name].append((instruction, rest))
        used |= {word.removeprefix("--from=") for word in words if word.startswith("--from=")}
    return {name: stage for name, stage in stages.items() if name not in used}


def _in_context(source: str) -> bool:
    """What .dockerignore lets through: it refuses everything, then names exceptions and exclusions inside them."""
    kept = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        allow = pattern.startswith("!")
        pattern = pattern.removeprefix("!").removeprefix("**/")
        parents = [source, *(str(parent) for parent in Path(source).parents if str(parent) != ".")]
        if any(fnmatch.fnmatch(candidate, pattern) or fnmatch.fnmatch(Path(candidate).name, pattern) for candidate in parents):
            kept = allow
    return kept
