"""Runs kustomize: ``kustomize build`` or, where only that is there, ``kubectl kustomize``."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from k8s_checks.objects import Object, parse

ROOT = Path(__file__).parents[2]
HOW_TO_INSTALL = (
    "Neither kustomize nor kubectl is on PATH, so no manifest can be rendered. Install one of them:\n"
    "  kustomize 5   https://kubectl.docs.kubernetes.io/installation/kustomize/ (Debian 13: apt install kustomize)\n"
    "  kubectl       1.27 or newer, https://kubernetes.io/docs/tasks/tools/ (Homebrew: brew install kubectl)"
)


class RenderFailed(Exception):
    """kustomize refused; the message is its own."""


def tool() -> list[str] | None:
    """The command that renders a folder; None when there is none."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None


def targets() -> list[Path]:
    """Everything that is meant to be applied: the overlays and the examples."""
    return sorted(path.parent for folder in ("overlays", "examples") for path in (ROOT / "k8s" / folder).glob("*/kustomization.yaml"))


def render(directory: Path) -> list[Object]:
    """The objects of one folder.

    Raises:
        RenderFailed: no tool, or kustomize says why not.
    """
    command = tool()
    if command is None:
        raise RenderFailed(HOW_TO_INSTALL)
    done = subprocess.run([*command, str(directory)], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise RenderFailed(f"{' '.join(command)} {directory}: {done.stderr.strip()}")
    return parse(done.stdout)
