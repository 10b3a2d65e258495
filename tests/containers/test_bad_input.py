"""Wrong settings and a full volume: the message names the setting, or the run goes on when the cause is gone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from standalone.submitting import upload_all
from tests.conftest import free_port
from tests.containers.stack import ENDED, ROOT, SECRETS, Stack, quick_recipe, until

HERE = Path(__file__).parent
FILLER = "/var/lib/parampara/artifacts/filler"


@pytest.mark.parametrize("missing", SECRETS)
def test_a_missing_secret_is_named_before_anything_starts(missing: str, tmp_path: Path) -> None:
    stack = Stack("parampara-missing", port=free_port(), folder=tmp_path)
    lines = stack.env_file.read_text(encoding="utf-8").splitlines()
    stack.env_file.write_text("\n".join(line for line in lines if not line.startswith(missing)), encoding="utf-8")
    done = stack.up(check=False)
    assert done.returncode != 0
    assert f"set {missing} in .env" in done.stderr
    assert stack.compose("ps", "--all", "--quiet", **{missing: "x"}).stdout == ""


def test_volumes_without_their_env_file_are_named_before_anything_is_built(tmp_path: Path) -> None:
    """A database keeps the password it was made with: a new `.env` beside old volumes would only make every service fail."""
    project, volume = "parampara-left", "parampara-left_postgres"
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/compose_demo.py", tmp_path / "scripts")
    shutil.copy(ROOT / ".env.example", tmp_path)
    _docker("volume", "create", "--label", f"com.docker.compose.project={project}", volume)
    try:
        shutil.copy(ROOT / "compose.yaml", tmp_path)
        command = [sys.executable, str(tmp_path / "scripts/compose_demo.py"), "--down"]
        environment = {**os.environ, "COMPOSE_PROJECT_NAME": project, **dict.fromkeys(SECRETS, "x")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert volume in done.stderr
        assert f"docker compose --project-name {project}" in done.stderr
        assert not (tmp_path / ".env").exists()
        assert _docker("volume", "inspect", volume).returncode == 0, "what was refused is not deleted either"
    finally:
        _docker("volume", "rm", volume)


@pytest.mark.timeout(300)
def test_a_stack_for_tests_starts_whatever_an_interrupted_run_left(tmp_path: Path) -> None:
    for name in ("interrupted", "later"):
        (tmp_path / name).mkdir()
        stack = Stack("parampara-again", port=free_port(), folder=tmp_path / name)  # the second has other passwords
        stack.up("postgres", wait=120)
    try:
        migrated = stack.compose("run", "--rm", "--no-TTY", "migrate", check=False)
        assert migrated.returncode == 0, migrated.stderr
    finally:
        stack.down()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Postgres and Redis of a project of their own, migrated."""
    stack = Stack("parampara-servers", port=free_port(), folder=tmp_path_factory.mktemp("servers"))
    try:
        stack.up("postgres", "redis")
        stack.compose("run", "--rm", "--no-TTY", "migrate")
        yield stack
    finally:
        stack.down()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("service", ["migrate", "control-plane"])
def test_a_wrong_database_password_ends_with_the_settings_name(servers: Stack, service: str) -> None:
    wrong = "postgresql+psycopg://parampara:wrong@postgres:5432/parampara"
    done = servers.once(service, PARAMPARA_DATABASE__URL=wrong)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "password authentication failed" in said
    assert "PARAMPARA_DATABASE__URL" in said
    assert "Traceback" not in said
    assert "wrong@" not in said, "the password is not shown"


@pytest.mark.timeout(300)
def test_a_worker_with_a_wrong_redis_password_says_so_and_works_on_by_polling(servers: Stack) -> None:
    name = f"{servers.project}-wrong-redis"
    servers.compose("run", "--detach", "--no-deps", "--name", name, "--env", "PARAMPARA_REDIS__URL=redis://:wrong@redis:6379/0", "merger")
    try:
        check = ("exec", name, "python", "/opt/healthcheck.py", "http://127.0.0.1:9100/readyz")
        until("ready worker", lambda: _docker(*check).returncode == 0, seconds=90)
        log = until("word on Redis", lambda: _named(_docker("logs", name).stderr + _docker("logs", name).stdout), seconds=60)
        assert "redis://:wrong" not in log
    finally:
        _docker("rm", "--force", name)


@pytest.mark.timeout(400)
def test_a_service_that_never_becomes_healthy_stops_the_start_and_says_why(servers: Stack) -> None:
    done = servers.up("embedder", check=False, wait=180, PARAMPARA_EMBEDDER__MODEL="no-such-model")
    assert done.returncode != 0
    log = servers.logs("embedder")
    assert "no-such-model" in log
    assert "PARAMPARA_EMBEDDER__MODEL" in log
    servers.compose("rm", "--force", "--stop", "embedder")


@pytest.mark.timeout(900)
def test_a_full_volume_fails_the_stage_by_name_and_a_retry_goes_on_when_there_is_room(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, list[Path]]
) -> None:
    stack = Stack("parampara-full", port=free_port(), folder=tmp_path_factory.mktemp("full"), overrides=[HERE / "full-volume.yaml"])
    try:
        stack.up("gateway", "trainer", "merger")
        stack.python("trainer", f"open({FILLER!r}, 'wb').write(bytes(62 << 20))")  # 2 of 64 MB are left: an adapter fits, a model does not
        platform = stack.platform()
        recipe = quick_recipe(gates=[])
        run = platform.post("/runs", {"recipe_yaml": recipe, "datasets": upload_all(platform, data)})["id"]
        ended = until("end", lambda: (found := platform.get(f"/runs/{run}"))["status"] in ENDED and found, seconds=300)
        assert ended["status"] == "failed"
        assert ended["error"]["code"] == "disk_full", ended["error"]
        assert "artifacts" in ended["error"]["message"]
        failed = next(job for job in ended["jobs"] if job["status"] == "failed")
        assert stack.python("merger", "import os; print(os.listdir('/var/lib/parampara/artifacts/staging'))").strip() in ("[]", "")

        stack.python("trainer", f"import os; os.remove({FILLER!r})")
        platform.post(f"/runs/{run}/retry")
        until("success of that stage", lambda: platform.get(f"/jobs/{failed['id']}")["status"] == "succeeded", seconds=300)
        platform.post(f"/runs/{run}/cancel")
    finally:
        stack.down()


def _docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)


def _named(log: str) -> str | None:
    return log if "PARAMPARA_REDIS__URL" in log else None
