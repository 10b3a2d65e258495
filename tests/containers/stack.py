"""A composed stack for tests, in a project of its own: other names, other port, other volumes than `docker compose up`."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from standalone.client import Platform

ROOT = Path(__file__).parents[2]
SECRETS = ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "PARAMPARA_KEY_PEPPER")
KEY_FILE = "/var/lib/parampara/api-key"
ENDED = ("succeeded", "failed", "cancelled")


class Stack:
    """One project of `docker compose`; images are built once and shared with every other project.

    Whatever an interrupted run has left under the project's name is removed first: its volumes know other passwords.
    """

    def __init__(self, project: str, *, port: int, folder: Path, overrides: Sequence[Path] = ()) -> None:
        self.project = project
        self.port = port
        self.env_file = folder / f"{project}.env"
        self.env_file.write_text("".join(f"{name}={secrets.token_hex(16)}\n" for name in SECRETS), encoding="utf-8")
        files = [ROOT / "compose.yaml", *overrides]
        self._command = ["docker", "compose", *(word for file in files for word in ("--file", str(file)))]
        self._command += ["--project-name", project, "--env-file", str(self.env_file)]
        self.down()

    def compose(self, *arguments: str, check: bool = True, timeout: float = 600, **variables: str) -> subprocess.CompletedProcess[str]:
        """One call; ``variables`` stand above the env file, as a shell's would."""
        given = {**os.environ, "BIND_PORT": str(self.port), **variables}
        done = subprocess.run(
            [*self._command, *arguments], cwd=ROOT, env=given, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check:
            assert done.returncode == 0, f"docker compose {' '.join(arguments)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done

    def up(self, *services: str, check: bool = True, wait: int = 600, **variables: str) -> subprocess.CompletedProcess[str]:
        arguments = ("up", "--detach", "--no-build", "--wait", "--wait-timeout", str(wait), *services)
        done = self.compose(*arguments, check=False, timeout=wait + 60, **variables)
        if check and done.returncode != 0:
            logs = self.compose("logs", "--no-color", "--tail", "20", check=False).stdout
            raise AssertionError(f"docker compose {' '.join(arguments)}:\n{done.stderr[-2000:]}\n{logs}")
        return done

    def down(self) -> None:
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "10", check=False)

    def once(self, service: str, *command: str, timeout: float = 180, **variables: str) -> subprocess.CompletedProcess[str]:
        """A container of ``service`` beside the stack, with other settings."""
        options = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
        return self.compose("run", "--rm", "--no-deps", "--no-TTY", *options, service, *command, check=False, timeout=timeout)

    def container(self, service: str) -> str:
        return self.compose("ps", "--all", "--quiet", service).stdout.strip()

    def inspect(self, service: str) -> dict[str, Any]:
        done = subprocess.run(["docker", "inspect", self.container(service)], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)[0]

    def kill(self, service: str) -> None:
        """`docker kill`: SIGKILL from outside. Docker does not start such a container again by itself."""
        subprocess.run(["docker", "kill", self.container(service)], capture_output=True, check=True)

    def python(self, service: str, code: str) -> str:
        """Run Python inside a service's container; what it printed."""
        return self.compose("exec", "--no-TTY", service, "python", "-c", code).stdout

    def logs(self, service: str, *, lines: int = 200) -> str:
        return self.compose("logs", "--no-color", "--no-log-prefix", "--tail", str(lines), service).stdout

    def platform(self) -> Platform:
        """The REST API through the published port, with the administrator's key."""
        key = self.compose("exec", "--no-TTY", "control-plane", "cat", KEY_FILE).stdout.strip()
        return Platform(f"http://127.0.0.1:{self.port}/v1", key)


def quick_recipe(*, sft_steps: int = 150, **changes: Any) -> str:
    """`recipes/tiny-cpu.yaml` with few steps and gates that do not ask for learning; for what a run survives, not what it learns."""
    recipe = yaml.safe_load((ROOT / "recipes/tiny-cpu.yaml").read_text(encoding="utf-8"))
    recipe["stages"]["dapt"]["train"].update(epochs=1, max_steps=8, checkpoint_steps=4)
    recipe["stages"]["sft"]["train"].update(epochs=1, max_steps=sft_steps, checkpoint_steps=10)
    recipe["stages"]["evaluate"].update(max_questions=16, max_chunks=4, parity_prompts=4)
    recipe["gates"] = [{"metric": f"parity.{name}", "min": 0.99, "action": "fail"} for name in ("dapt.top1", "merged.top1")]
    return yaml.safe_dump({**recipe, **changes})


def until(what: str, ready: Callable[[], Any], *, seconds: float = 300, pause: float = 0.5) -> Any:
    """Wait for ``ready()`` to be true and return what it returned."""
    deadline = time.monotonic() + seconds
    while True:
        found = ready()
        if found:
            return found
        assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s"
        time.sleep(pause)
