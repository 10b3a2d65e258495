"""Where everything lies: the project's own files, the two environments, and the state folder."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from parampara.errors import InvalidRequest


@dataclass(frozen=True)
class Places:
    """Paths of one standalone stack; ``home`` is absolute."""

    project: Path
    home: Path

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def lock(self) -> Path:
        return self.home / "stack.lock"

    @property
    def state(self) -> Path:
        return self.home / "stack.json"

    @property
    def api_key(self) -> Path:
        return self.home / "api-key"

    @property
    def demo(self) -> Path:
        return self.home / "demo"

    @property
    def base_model(self) -> Path:
        return self.project / "examples" / "kp" / "base"


def find_places() -> Places:
    """The project this package was installed from, and ``PARAMPARA_HOME`` or ``.parampara`` in it.

    Raises:
        InvalidRequest: the project's folder cannot be found.
    """
    project = _project()
    home = Path(os.environ.get("PARAMPARA_HOME") or project / ".parampara")
    return Places(project=project, home=Path(os.path.abspath(home)))


def vllm_environment(project: Path) -> Path:
    """The virtual environment that holds vLLM (``PARAMPARA_VLLM_ENV``, else ``.venv-vllm`` of the project)."""
    return Path(os.environ.get("PARAMPARA_VLLM_ENV") or project / ".venv-vllm")


def vllm_command(project: Path) -> list[str]:
    """How the standalone stack starts vLLM's OpenAI server; the model path follows.

    Raises:
        InvalidRequest: the environment was not made.
    """
    python = vllm_environment(project) / "bin" / "python"
    if not python.exists():
        raise InvalidRequest(
            f"There is no vLLM environment at {python.parent.parent}: run `make setup`, or name another one in PARAMPARA_VLLM_ENV.",
            param="PARAMPARA_VLLM_ENV",
        )
    return [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model"]


def vllm_on_cpu(project: Path) -> bool:
    """Whether set-up installed vLLM's CPU build (its stamp says so)."""
    stamp = vllm_environment(project) / "parampara-setup.json"
    try:
        return json.loads(stamp.read_text(encoding="utf-8"))["torch"] == "cpu"
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _project() -> Path:
    if named := os.environ.get("PARAMPARA_PROJECT"):
        return Path(named).resolve()
    candidates = [*Path(__file__).resolve().parents, Path(sys.prefix).resolve().parent, *[Path.cwd(), *Path.cwd().parents]]
    for candidate in candidates:
        if (candidate / "recipes").is_dir() and (candidate / "examples").is_dir():
            return candidate
    raise InvalidRequest("Cannot find Parampara's project folder (with recipes/ and examples/); name it in PARAMPARA_PROJECT.")
