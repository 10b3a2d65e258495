"""The images' lock files: complete, hashed, not stale, and at the versions that everything else is tested with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.deploy.deployment_files import ROOT, script

locks = script("locks")
each_lock = pytest.mark.parametrize("lock", locks.LOCKS, ids=lambda lock: lock.path.removeprefix("docker/"))
CUDA = re.compile(r"nvidia-|cuda-|torch")
WITHOUT_MODELS = {"control_plane", "gateway", "ingestor", "model_server"}


def text(lock) -> str:
    return (ROOT / lock.path).read_text(encoding="utf-8")


def test_every_lock_file_is_made_by_the_script() -> None:
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "docker").rglob("*.txt")}
    assert found == {lock.path for lock in locks.LOCKS}


@each_lock
def test_no_lock_is_stale(lock) -> None:
    assert locks.stale(lock) is None, "make locks"


@each_lock
def test_every_requirement_is_exact_and_hashed(lock) -> None:
    requirements = [block for block in re.split(r"^(?=\w)", text(lock), flags=re.MULTILINE) if not block.startswith("#")]
    assert requirements
    for block in requirements:
        assert re.match(r"[\w.-]+==[\w.+!]+ \\\n", block), block.splitlines()[0]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block), f"{block.splitlines()[0]} has no hash"
    assert len(requirements) == len(locks.pins(ROOT / lock.path))


@each_lock
def test_a_lock_names_no_place_to_download_from(lock) -> None:
    assert not re.search(r"://|--(extra-)?index|--find-links|(?<!\w)/\w", text(lock).split("\n", 1)[1]), lock.path


@each_lock
def test_a_lock_covers_what_is_declared(lock) -> None:
    pins = locks.pins(ROOT / lock.path)
    for line in locks.requirements(lock):
        requirement = Requirement(line)
        name = locks.normal(requirement.name)
        if lock.kept and name not in lock.kept:
            continue  # already in the image that this lock adds to
        assert name in pins, f"{lock.path} lacks {line}"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{line}, not {pins[name]}"


@each_lock
def test_a_lock_holds_nothing_that_was_left_out(lock) -> None:
    assert not set(locks.pins(ROOT / lock.path)) & {locks.normal(name) for name in lock.excluded}


def test_a_stale_lock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("shared", "services/gateway", "docker/gateway"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("constraints.txt", "shared/pyproject.toml", "services/gateway/pyproject.toml", "docker/gateway/requirements.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    lock = next(lock for lock in locks.LOCKS if lock.service == "gateway")
    monkeypatch.setattr(locks, "ROOT", tmp_path)
    assert locks.stale(lock) is None
    constraints = (tmp_path / "constraints.txt").read_text(encoding="utf-8")
    (tmp_path / "constraints.txt").write_text(re.sub(r"^aiohttp==.*$", "aiohttp==0.1", constraints, flags=re.MULTILINE), encoding="utf-8")
    assert "aiohttp" in locks.stale(lock)
    (tmp_path / "constraints.txt").write_text(constraints, encoding="utf-8")
    project = tmp_path / "services/gateway/pyproject.toml"
    project.write_text(project.read_text(encoding="utf-8").replace('"orjson>=3.11",', '"orjson>=3.11",\n    "rich>=15",'), encoding="utf-8")
    assert locks.stale(lock) == "was made from other requirements"


@pytest.mark.parametrize(
    "lock", [lock for lock in locks.LOCKS if "cuda" not in lock.path], ids=lambda lock: lock.path.removeprefix("docker/")
)
def test_no_cpu_image_gets_cuda_packages(lock) -> None:
    allowed = {"triton"} if lock.service == "trainer" else set()  # Unsloth imports it at its start
    pins = set(locks.pins(ROOT / lock.path))
    assert {name for name in pins if CUDA.match(name)} == set()
    assert "triton" not in pins - allowed


@pytest.mark.parametrize("service", ["trainer", "quantizer", "evaluator"])
def test_cuda_images_get_the_torch_that_everything_else_is_tested_with(service: str) -> None:
    pins = locks.pins(ROOT / f"docker/{service}/requirements.cuda.txt")
    constrained = locks.pins(ROOT / "constraints.txt")
    assert pins["torch"] == constrained["torch"]
    assert any(name.startswith("nvidia-") for name in pins), "PyTorch's CUDA libraries are part of the lock"


@pytest.mark.parametrize("service", sorted(WITHOUT_MODELS))
def test_images_without_models_carry_no_machine_learning_library(service: str) -> None:
    for lock in locks.LOCKS:
        if lock.service == service:
            forbidden = {"torch", "numpy", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes", "datasets", "trl", "vllm"}
            assert not set(locks.pins(ROOT / lock.path)) & forbidden


def test_vllm_on_cpu_is_the_same_set_as_without_containers() -> None:
    outside = locks.pins(ROOT / "requirements/vllm-cpu.lock.txt")
    inside = locks.pins(ROOT / "docker/model_server/vllm.cpu.txt")
    del outside["ninja"]  # nothing is compiled
    del inside["setuptools"]  # imported by vLLM through PyTorch; outside it comes with the environment
    assert outside == inside


def test_vllm_on_a_gpu_is_one_version_everywhere() -> None:
    version = locks.pins(ROOT / "requirements/vllm-gpu.txt")["vllm"]
    for name in ("docker/model_server/Dockerfile.gpu", "compose.gpu.yaml", ".env.example"):
        assert set(re.findall(r"vllm/vllm-openai:v([\d.]+)", (ROOT / name).read_text(encoding="utf-8"))) == {version}, name


def test_torch_on_cpu_is_installed_alone_at_the_constrained_version() -> None:
    script = (ROOT / "docker/install.sh").read_text(encoding="utf-8")
    assert re.findall(r"torch==(\S+)", script) == [locks.pins(ROOT / "constraints.txt")["torch"]]
    needs = {locks.requirement_name(line) for line in locks.TORCH_NEEDS}
    for lock in locks.LOCKS:
        if lock.without_torch:
            assert needs <= set(locks.pins(ROOT / lock.path)), lock.path


def test_torch_needs_what_the_script_says() -> None:
    """The CPU wheel is resolved nowhere, so its own list is kept by hand; compared where one is installed."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        torch = distribution("torch")
    except PackageNotFoundError:
        pytest.skip("torch is not installed")
    if not torch.version.endswith("+cpu"):
        pytest.skip("this is not PyTorch's CPU build")
    found = [Requirement(line) for line in torch.requires or []]
    wanted = {
        locks.normal(need.name) for need in found if need.marker is None or need.marker.evaluate({"extra": "", "python_version": "3.11"})
    }
    assert wanted - {"setuptools"} == set(locks.TORCH_NEEDS), "setuptools is asked for by torch's compilers only"
