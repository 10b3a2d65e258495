"""Every service has an image that builds from files that exist, runs without root and says whether it is healthy."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.deployment_files import ROOT, instructions

DOCKERFILES = sorted((ROOT / "docker").glob("*/Dockerfile*"))
SERVICES = sorted(path.name for path in (ROOT / "services").iterdir() if (path / "pyproject.toml").is_file())
SBOM = ROOT / "docker/sbom.Dockerfile"

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
def test_every_final_stage_has_an_init_that_reaps_and_passes_signals_on(dockerfile: Path) -> None:
    """Stage processes leave orphans, and not every runtime puts an init of its own before the program."""
    for name, stage in _final_stages(dockerfile).items():
        entrypoints = [rest for instruction, rest in stage if instruction == "ENTRYPOINT"]
        assert entrypoints == ['["tini", "--"]'], name
        assert ("STOPSIGNAL", "SIGTERM") in stage, name
    assert re.search(r"install -y --no-install-recommends tini\b", (ROOT / "docker/runtime.sh").read_text(encoding="utf-8"))


@each_dockerfile
def test_every_final_stage_says_what_it_is(dockerfile: Path) -> None:
    version = tomllib.loads((ROOT / "shared/pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for name, stage in _final_stages(dockerfile).items():
        arguments = [rest for instruction, rest in stage if instruction == "ARG"]
        assert {f"VERSION={version}", "REVISION=unknown"} <= set(arguments), name
        labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]+)"', " ".join(rest for key, rest in stage if key == "LABEL")))
        assert set(labels) == {"title", "description", "licenses", "version", "revision"}, name
        assert labels["licenses"] == "Apache-2.0"
        assert (labels["version"], labels["revision"]) == ("$VERSION", "$REVISION")


@each_dockerfile
def test_libraries_come_from_a_lock_by_hash(dockerfile: Path) -> None:
    """No resolving in a build: either install.sh does it, or uv with the same options."""
    for instruction, rest in instructions(dockerfile):
        if instruction == "RUN" and "install -" in rest and "apt-get" not in rest:
            assert "uv pip install" in rest, rest
            for command in re.findall(r"uv pip install[^&|;]*", rest):
                assert "--no-deps" in command, command
                assert "--require-hashes" in command or "--build-constraints /build.txt" in command, command
    script = (ROOT / "docker/install.sh").read_text(encoding="utf-8")
    assert "install --no-deps" in script
    assert "libraries) install --require-hashes" in script
    assert "pip install --no-deps --require-hashes -r /build.txt" in script
    assert "--no-build-isolation" in script


@each_dockerfile
def test_code_comes_after_libraries(dockerfile: Path) -> None:
    for name, stage in _final_stages(dockerfile).items():
        copied = [match[1] for _, rest in stage if (match := re.match(r"--from=(\w+) ", rest))]
        assert copied[-1] == "code", name
        assert "libraries" in copied, name
    for instruction, rest in _stage(dockerfile, "libraries"):
        assert not (instruction == "COPY" and re.match(r"(shared|services)\b", rest)), "a change of code would install libraries again"


@each_dockerfile
def test_torch_is_the_cpu_build_unless_asked(dockerfile: Path) -> None:
    text = dockerfile.read_text(encoding="utf-8")
    if "install.sh torch" in text:
        assert "ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu" in text
    if "VARIANT" in text:
        assert ("ARG", "VARIANT=cpu") in instructions(dockerfile)


@pytest.mark.parametrize("service", sorted(set(SERVICES) - {"standalone"}))
def test_an_image_installs_the_service_of_its_folder(service: str) -> None:
    for dockerfile in (ROOT / "docker" / service).glob("Dockerfile*"):
        assert f"services/{service}" in _copied(dockerfile), dockerfile


def test_the_health_check_tells_a_good_answer_from_a_bad_one() -> None:
    script = ROOT / "docker/healthcheck.py"
    result = subprocess.run([sys.executable, script, "http://127.0.0.1:9/readyz"], capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode == 1
    assert "127.0.0.1:9" in result.stdout


def test_the_bill_of_materials_covers_both_environments() -> None:
    assert "for environment in /opt/venv /opt/vllm;" in (ROOT / "docker/sbom.sh").read_text(encoding="utf-8")
    assert [rest for instruction, rest in instructions(SBOM) if instruction == "FROM"][-1] == "scratch AS sbom"
    for source in _copied(SBOM):
        assert (ROOT / source).exists(), source
        assert _in_context(source), source


def _copied(dockerfile: Path) -> list[str]:
    """Sources of COPY and of bind mounts that come from the build context, for each variant of the image."""
    sources = []
    for instruction, rest in instructions(dockerfile):
        words = shlex.split(rest)
        if instruction == "COPY" and not any(word.startswith("--from") for word in words):
            sources += [word.rstrip("/") for word in words[:-1] if not word.startswith("--")]
        if instruction == "RUN":
            sources += re.findall(r"type=bind,source=([\w./]+)", rest)
    return [source.replace("${VARIANT}", variant) for source in sources for variant in ("cpu", "cuda")]


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
            used |= {words[0].replace("${VARIANT}", variant) for variant in ("cpu", "cuda")}
        elif name:
            stages[name].append((instruction, rest))
        used |= {word.removeprefix("--from=") for word in words if word.startswith("--from=")}
    return {name: stage for name, stage in stages.items() if name not in used}


def _stage(dockerfile: Path, wanted: str) -> list[tuple[str, str]]:
    """Instructions of the stage called ``wanted``."""
    found: list[tuple[str, str]] = []
    name = ""
    for instruction, rest in instructions(dockerfile):
        name = rest.split()[-1] if instruction == "FROM" else name
        found += [(instruction, rest)] if name == wanted else []
    return found


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
