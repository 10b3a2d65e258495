"""docs/deploy.md: its commands parse, name only what exists, and its calls work against a real gateway and control plane."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer.main
import yaml
from sqlalchemy.orm import Session, sessionmaker

from control_plane.app import create_app
from control_plane.server import prepare
from gateway.app import Gateway
from parampara.schemas.recipe import load_recipe
from parampara.settings import Settings
from standalone.cli import app as command_line
from tests.contracts.servers import served
from tests.deploy.deployment_files import ROOT
from tests.deploy.test_api_docs import routes

__all__ = ["routes"]
GUIDE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OF_THE_COMMAND_LINE = {"PARAMPARA_BASE_URL", "PARAMPARA_API_KEY"}


def blocks(language: str, containing: str = "") -> list[str]:
    return [body for kind, body in _BLOCK.findall(GUIDE) if kind == language and containing in body]


def the_block(language: str, containing: str) -> str:
    (found,) = blocks(language, containing)
    return found


def commands() -> Iterator[list[str]]:
    """Every simple command of the shell blocks as its words; here-documents left out."""
    for block in blocks("sh"):
        text = re.sub(r"<<'?(\w+)'?(.*)\n.*?^\1$", r"\2", block, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
        for line in text.splitlines():
            for part in re.split(r"\s(?:\||&&|;)\s|\$\(", line):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:  # a quoted text of several lines: bash -n looks after it
                    continue
                if words:
                    yield words


# -------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block.strip().splitlines()[0][:40])
def test_shell_blocks_parse(block: str) -> None:
    outcome = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
    assert (outcome.returncode, outcome.stderr) == (0, "")


def test_python_and_json_blocks_parse() -> None:
    inside_shell = re.findall(r"<<'PY'.*?\n(.*?)^PY$", "\n".join(blocks("sh")), re.MULTILINE | re.DOTALL)
    assert len(inside_shell) >= 3
    for block in [*blocks("python"), *inside_shell]:
        ast.parse(block)
    for block in blocks("json"):
        for line in block.splitlines():
            json.loads(line)


def test_variables_are_documented(variables: dict[str, Any]) -> None:
    documented = set(re.findall(r"^#?([A-Z][A-Z0-9_]*)=", (ROOT / ".env.example").read_text(encoding="utf-8"), re.MULTILINE))
    written = set(re.findall(r"s[/|]\^#?([A-Z]\w+)=", GUIDE))
    written |= set(re.findall(r"^([A-Z][A-Z0-9_]+)=", the_block("sh", "cp .env.example .env").split("<<'EOF'")[1], re.MULTILINE))
    named = set(re.findall(r"\b(PARAMPARA_\w+|[A-Z]+_MEMORY|[A-Z]+_GPU|HF_CACHE_DIR|GRAFANA_\w+)\b", GUIDE))
    assert {"POSTGRES_PASSWORD", "HF_CACHE_DIR", "GRAFANA_PASSWORD", "PARAMPARA_GATEWAY__PUBLIC_URL"} <= written
    assert (written | named) - documented - OF_THE_COMMAND_LINE == set()
    assert {name for name in written | named if name.startswith("PARAMPARA_")} - set(variables) - OF_THE_COMMAND_LINE == set()


def test_files_and_services_exist(compose: dict[str, Any]) -> None:
    named = set(re.findall(r"[`\s/]((?:recipes|examples|docker|docs)/[\w./-]*\w)", GUIDE)) | {"compose.yaml", "compose.gpu.yaml"}
    assert [name for name in named if not (ROOT / name).exists()] == []
    for words in commands():
        if words[:2] == ["docker", "compose"]:
            plain = [word for word in words[2:] if not word.startswith("-")]
            known = {"up", "config", "build", "ps", "exec", "run", "logs", "stop", "start", "create"}
            assert plain[0] in known, words
            if plain[0] in ("exec", "run", "logs", "stop", "start", "create") or (plain[0] == "up" and plain[1:]):
                rest = [word for word in plain[1:] if word != "/srv/parampara/data:/data:ro"]
                services = rest if plain[0] == "up" else rest[:1]
                assert services, words
                assert set(services) <= set(compose["services"]), words
    volumes = set(re.findall(r"-v parampara_([\w-]+):", GUIDE))
    assert volumes == {"artifacts", "files", "state"}
    assert volumes <= set(compose["volumes"])
    assert compose["name"] == "parampara", "the prefix of the volumes' names"


def test_paths_inside_containers_are_the_mounted_ones(compose: dict[str, Any]) -> None:
    state = [mount.split(":") for mount in compose["services"]["control-plane"]["volumes"] if mount.startswith("state:")]
    assert f"cat {state[0][1]}/api-key" in GUIDE
    assert any(":/models/hub:ro" in mount for mount in compose["services"]["trainer"]["volumes"])
    assert "HF_HOME=/models/hub" in (ROOT / "docker" / "trainer" / "Dockerfile").read_text(encoding="utf-8")
    recipe = load_recipe(ROOT / "recipes" / "kp-llama-3.1-8b.yaml")
    assert f"/models/hub/hub/models--{recipe.base_model.replace('/', '--')}/snapshots/" in GUIDE
    assert f"hf download {recipe.base_model} " in GUIDE


def test_the_command_line_has_what_is_called() -> None:
    root = typer.main.get_command(command_line)
    called = [words for words in commands() if words[0].endswith("/parampara")]
    assert len(called) >= 2
    for words in called:
        command: Any = root
        arguments = words[1:]
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= options, words


def test_routes_exist(routes: set[tuple[str, str]]) -> None:
    known = [re.compile(re.escape(path).replace(re.escape("{}"), r"[^/\s]+")) for _, path in routes]
    by_curl = ["/v1" + path.rstrip(".").split("?")[0] for path in re.findall(r"\$BASE(/[\w./$?=-]+)", GUIDE)]
    named = re.findall(r"(?:GET|POST|DELETE) (/v1/[\w{}/.-]*[\w}])", GUIDE)
    assert len(by_curl) > 8
    assert [path for path in [*by_curl, *named] if not any(pattern.fullmatch(path) for pattern in known)] == []


def test_figures_are_the_recipe_s() -> None:
    recipe = load_recipe(ROOT / "recipes" / "kp-llama-3.1-8b.yaml")
    by_hand = [json.loads(body) for body in re.findall(r"<<EOF\n(\{.*\})\nEOF", GUIDE)]
    assert len(by_hand) == 2
    for body in by_hand:
        assert recipe.stages.deploy is not None
        assert body["alias"] == recipe.stages.deploy.alias
        assert set(body) == {"model", "alias"}, "the rest is the recipe's"
    assert any(gate.metric == "language.hinglish" for gate in recipe.gates)


def test_the_readme_and_operations_lead_here() -> None:
    assert "(docs/deploy.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(deploy.md)" in (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.+)$", GUIDE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", GUIDE)) <= headings


# -------------------------------------------------------------------------------------------------------------- calls


def sh(script: str, cwd: Path, **variables: str) -> str:
    """Run a block as it stands; fails with what it printed."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "LANG": "C.UTF-8", **variables}
    command = ["bash", "-euo", "pipefail", "-c", script]
    outcome = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


def test_the_environment_file_comes_out_whole(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    shutil.copy(ROOT / ".env.example", tmp_path)
    sh(the_block("sh", "cp .env.example .env"), tmp_path)
    sh(the_block("sh", "GRAFANA_PASSWORD=$(openssl").split("docker compose")[0], tmp_path)
    sh("\n".join(line for line in the_block("sh", "PUBLIC_URL").splitlines() if line.startswith("sed")), tmp_path)
    lines = dict(re.findall(r"^([A-Z]\w*)=(.+)$", (tmp_path / ".env").read_text(encoding="utf-8"), re.MULTILINE))
    for name in ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "PARAMPARA_KEY_PEPPER", "GRAFANA_PASSWORD"):
        assert re.fullmatch(r"[0-9a-f]{24,}", lines.pop(name)), name
    assert lines == {
        "COMPOSE_FILE": "compose.yaml:compose.gpu.yaml",
        "COMPOSE_PROFILES": "monitoring",
        "HF_CACHE_DIR": "/srv/parampara/hf",
        "TRAIN_GPU": "0",
        "SERVE_GPU": "0",
        "PARAMPARA_GATEWAY__PUBLIC_URL": "https://kp.example.org",
    }
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600


def test_data_are_checked_by_the_script_of_the_guide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = re.findall(r"<<'PY'\n(.*?)^PY$", the_block("sh", "validate_books"), re.MULTILINE | re.DOTALL)[0]
    write_data(tmp_path)
    exec(compile(script.replace("/data/", f"{tmp_path}/"), "guide", "exec"), {})
    assert capsys.readouterr().out.splitlines() == ["2 books can be read", "2 distinct questions with answers"]


@pytest.fixture
def platform(settings: Settings, sessions: sessionmaker[Session], tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Base URL of a gateway before a control plane that knows the KP recipe's base model, and the administrator's key."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}", encoding="utf-8")
    name = load_recipe(ROOT / "recipes" / "kp-llama-3.1-8b.yaml").base_model
    known = settings.model_copy(update={"base_models": {name: str(base)}})
    prepare(known, sessions)
    with served(create_app(known, sessions)) as control_plane:
        changed = known.gateway.model_copy(update={"control_plane_url": control_plane})
        with served(Gateway(known.model_copy(update={"gateway": changed}))) as gateway:
            yield f"{gateway}/v1", (known.home / "api-key").read_text(encoding="utf-8").strip()


def write_data(folder: Path) -> None:
    (folder / "books").mkdir(parents=True)
    (folder / "qa").mkdir()
    shutil.copy(ROOT / "examples/kp/books/1-signs-and-their-lords.txt", folder / "books" / "first book.txt")
    shutil.copy(ROOT / "examples/kp/books/3-dashas-and-subs.txt", folder / "books" / "second.md")
    rows = [json.loads(line) for line in the_block("json", "Revati").splitlines()] + [{"question": "Who rules Ashwini?", "answer": "Ketu"}]
    (folder / "qa" / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_calls_of_the_guide_work(platform: tuple[str, str], tmp_path: Path) -> None:
    """Key, submission, watching and gates as they are typed, against a real gateway and control plane."""
    url, key = platform
    write_data(tmp_path / "data")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    named = re.sub(r"^(export PARAMPARA_\w+=).*$", "", the_block("sh", "export PARAMPARA_API_KEY"), flags=re.MULTILINE)
    make_key = the_block("sh", "api_keys")
    submit = the_block("sh", "RUN=$(curl").replace("/srv/parampara/data", str(tmp_path / "data"))
    look = "\n".join(line for line in the_block("sh", "events/stream").splitlines() if "curl -sS" in line)
    gates = the_block("sh", "> run.state.json")
    steer = "\n".join(f'curl -sS -X POST "$BASE/runs/$RUN/{verb}" -H "$AUTH" | field status' for verb in ("cancel", "retry"))
    script = "\n".join([named, make_key, submit, look, gates, steer])
    told = sh(script, tmp_path, PARAMPARA_BASE_URL=url, PARAMPARA_API_KEY=key)
    run_id = re.findall(r"^run_[0-9a-f]+$", told, re.MULTILINE)[0]
    assert '"object":"list"' in "".join(told.split())
    assert '"scopes":["chat"]' in "".join(told.split())
    assert "queued gate: None model: None" in told
    assert told.split()[-2:] == ["cancelled", "queued"]
    run = httpx.get(f"{url}/runs/{run_id}", headers={"Authorization": f"Bearer {key}"}, trust_env=False).json()
    assert run["recipe"] == load_recipe(ROOT / "recipes" / "kp-llama-3.1-8b.yaml").model_dump(mode="json")
    assert {role: len(ids) for role, ids in run["datasets"].items() if ids} == {"books": 2, "qa": 1}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_refused_call_says_why(platform: tuple[str, str], tmp_path: Path) -> None:
    url, key = platform
    helpers = "\n".join(line for line in the_block("sh", "RUN=$(curl").splitlines() if line.startswith(("field()", "upload()")))
    script = f'{helpers}\nBASE={url}; AUTH="Authorization: Bearer {key}"\n: > empty.txt\nupload empty.txt'
    command = ["bash", "-c", textwrap.dedent(script)]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert outcome.returncode != 0
    assert "is empty" in outcome.stderr


def test_the_caddyfile_keeps_probes_and_metrics_inside() -> None:
    caddyfile = re.findall(r"Caddyfile <<'EOF'\n(.*?)^EOF$", GUIDE, re.MULTILINE | re.DOTALL)[0]
    from gateway.health import PUBLIC_PATHS
    from parampara.http import DOCS_PATHS

    inside = set(re.findall(r"@inside path (.+)", caddyfile)[0].split())
    assert inside == PUBLIC_PATHS - DOCS_PATHS
    assert yaml.safe_load(re.findall(r"max_size (\d+)MB", caddyfile)[0]) * 1_000_000 > Settings.model_fields["max_upload_bytes"].default
