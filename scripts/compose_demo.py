"""Bring the composed stack up and carry the main job through its published port: `make compose-demo`.

    python3 scripts/compose_demo.py [--recipe FILE] [--fresh] [--down] [--skip-without-engine]

Needs Docker with compose and Python 3.11; no GPU. What it does, each step a command that you may type yourself:

1. writes `.env` with random secrets where there is none;
2. `docker compose up --build --wait`;
3. makes `.venv-client`, a small environment with the `parampara` command (none of the services);
4. `parampara demo` against http://127.0.0.1:8000/v1, with the key that the control plane wrote at its first start.

The stack stays up; `--down` removes it again with its volumes. Exit code 0 only if every question was answered.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENV = ROOT / ".env"
SECRETS = ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "PARAMPARA_KEY_PEPPER")
KEY_FILE = "/var/lib/parampara/api-key"
UP_SECONDS = 1200
PROJECT = "parampara"
"""The name in compose.yaml."""


class DemoFailed(Exception):
    """It cannot go on; the message says what to do."""


def main() -> int:
    arguments = _parse()
    if fault := engine_fault():
        print(f"{'skipped' if arguments.skip_without_engine else 'compose-demo failed'}: {fault}", file=sys.stderr)
        return 0 if arguments.skip_without_engine else 1
    started = False
    try:
        if not ENV.exists():
            require_no_volumes()
        if write_env(ENV):
            print(f"wrote {ENV.name} with random secrets", flush=True)
        require_port()
        started = True
        up()
        code = demo(arguments)
    except DemoFailed as error:
        print(f"\ncompose-demo failed: {error}", file=sys.stderr)
        code = 1
    finally:
        if arguments.down and started:  # else what is there is an earlier stack's
            compose("down", "--volumes", "--remove-orphans", check=False)
    if not arguments.down:
        print("the stack stays up; `docker compose down` stops it, `docker compose down --volumes` also deletes what it made")
    return code


def engine_fault() -> str | None:
    """Why no container can run here, or None."""
    for command, need in (
        (("docker", "compose", "version"), "Docker with the compose plugin"),
        (("docker", "version"), "a running Docker engine"),
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return f"{need} is needed and `docker` was not found. Install Docker Engine, or name another one in DOCKER_HOST."
        if done.returncode != 0:
            return f"{need} is needed; `{' '.join(command)}` says: {done.stderr.strip()[-300:]}"
    return None


def write_env(path: Path) -> bool:
    """Make ``.env`` out of ``.env.example`` with random secrets. False: there is one, it is left alone."""
    if path.exists():
        return False
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    for name in SECRETS:
        text, found = re.subn(rf"(?m)^{name}=$", f"{name}={secrets.token_hex(24)}", text)
        if found != 1:
            raise DemoFailed(f".env.example has no line {name}=")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    return True


def require_no_volumes() -> None:
    """No earlier stack of this name has left data behind: a database keeps the password that it was made with, and new ones do not open it.

    Raises:
        DemoFailed: it has, and its ``.env`` is not here; said before anything is built.
    """
    project = os.environ.get("COMPOSE_PROJECT_NAME", PROJECT)
    label = f"label=com.docker.compose.project={project}"
    found = subprocess.run(["docker", "volume", "ls", "--quiet", "--filter", label], capture_output=True, text=True, check=False)
    if volumes := found.stdout.split():
        raise DemoFailed(
            f"there is no .env here, but volumes of an earlier stack are: {', '.join(sorted(volumes))}. Their data opens only with the"
            f" passwords of the .env that it was made with: put that file back, or delete what that stack made with"
            f" `docker compose --project-name {project} --env-file .ci/compose.env down --volumes`."
        )


def require_port() -> None:
    """The port that the gateway is to be published on is free, or the stack itself has it.

    Raises:
        DemoFailed: something else has it; said before the images are built, with the setting.
    """
    if compose("ps", "--quiet", "--status", "running", "gateway", capture=True).stdout.strip():
        return
    (port,) = json.loads(compose("config", "--format", "json", capture=True).stdout)["services"]["gateway"]["ports"]
    address = (port.get("host_ip", "127.0.0.1"), int(port["published"]))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise DemoFailed(
                f"the gateway cannot be published on {address[0]}:{address[1]} ({error.strerror}): set BIND_PORT in .env"
            ) from None


def up() -> None:
    """Build, start and wait until every service is healthy.

    Raises:
        DemoFailed: compose could not; with the last words of each service that is not well.
    """
    if compose("up", "--build", "--wait", "--wait-timeout", str(UP_SECONDS), check=False).returncode != 0:
        raise DemoFailed(f"`docker compose up --build --wait` did not succeed.\n{ailing()}")


def ailing() -> str:
    """State and last log lines of every service that neither is healthy nor has done its work."""
    told = []
    for line in compose("ps", "--all", "--format", "json", capture=True, check=False).stdout.splitlines():
        row = json.loads(line)
        well = (
            row["Health"] == "healthy"
            or (row["State"] == "running" and not row["Health"])
            or (row["State"], row["ExitCode"]) == ("exited", 0)
        )
        if not well:
            log = compose("logs", "--no-color", "--no-log-prefix", "--tail", "12", row["Service"], capture=True, check=False).stdout
            told.append(f"{row['Service']}: {row['Status']}\n" + "\n".join(f"    {line[:300]}" for line in log.splitlines()))
    return "\n".join(told) or "`docker compose ps --all` shows nothing that is ill."


def demo(arguments: argparse.Namespace) -> int:
    """`parampara demo` against the published port; its exit code."""
    address = compose("port", "gateway", "8000", capture=True).stdout.strip().replace("0.0.0.0", "127.0.0.1")
    key = compose("exec", "--no-TTY", "control-plane", "cat", KEY_FILE, capture=True).stdout.strip()
    command = [str(client()), "demo", *(["--fresh"] if arguments.fresh else [])]
    command += ["--recipe", str(arguments.recipe.resolve())] if arguments.recipe else []
    variables = {
        **os.environ,
        "PARAMPARA_HOME": os.environ.get("PARAMPARA_HOME") or str(ROOT / ".parampara" / "compose"),
        "PARAMPARA_BASE_URL": f"http://{address}/v1",
        "PARAMPARA_API_KEY": key,
        "PARAMPARA_PROJECT": str(ROOT),
    }
    return subprocess.run(command, env=variables, cwd=ROOT, check=False).returncode


def client() -> Path:
    """The `parampara` command: of `.venv` where set-up has made it, else of a small environment for it alone."""
    full = ROOT / ".venv" / "bin" / "parampara"
    if full.exists():
        return full
    made = subprocess.run([sys.executable, str(ROOT / "scripts" / "setup.py"), "--only", "client"], cwd=ROOT, check=False)
    if made.returncode != 0:
        raise DemoFailed("the client's environment could not be made; see above")
    return ROOT / ".venv-client" / "bin" / "parampara"


def compose(*arguments: str, capture: bool = False, check: bool = True) -> subprocess.CompletedProcess[str]:
    """One `docker compose` call in the project's folder.

    Raises:
        DemoFailed: it failed and ``check`` is set; with its words.
    """
    done = subprocess.run(["docker", "compose", *arguments], cwd=ROOT, text=True, capture_output=capture, check=False)
    if check and done.returncode != 0:
        raise DemoFailed(f"`docker compose {' '.join(arguments)}`: {(done.stderr or '').strip()[-500:]}")
    return done


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="recipe instead of recipes/tiny-cpu.yaml")
    parser.add_argument("--fresh", action="store_true", help="make everything again, also what an earlier run has made")
    parser.add_argument("--down", action="store_true", help="remove the stack and its volumes at the end")
    parser.add_argument("--skip-without-engine", action="store_true", help="exit 0 with a word where no container engine runs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
