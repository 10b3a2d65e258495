"""The compose files agree with the code: commands, settings, ports, probes, queues, images, networks and secrets."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from parampara.plan import QUEUES
from parampara.settings import Settings
from tests.deploy.conftest import Variable
from tests.deploy.deployment_files import ROOT, instructions, substituted, substitutions

HOME = "/var/lib/parampara"
SECRETS = {"POSTGRES_PASSWORD": "pw1", "REDIS_PASSWORD": "pw2", "PARAMPARA_KEY_PEPPER": "pepper"}
HTTP_SERVICES = {"gateway": "gateway", "control-plane": "control_plane", "embedder": "embedder", "model-server": "model_server"}
"""Compose service to the settings section that holds its port."""
Compose = dict[str, Any]


def ours(compose: Compose) -> dict[str, Compose]:
    """The services that are built from this repository."""
    return {name: service for name, service in compose["services"].items() if "build" in service}


def environment(service: Compose) -> dict[str, str]:
    """What a container gets when .env holds nothing but the secrets."""
    given = {name: value for name, value in service.get("environment", {}).items() if value is not None}
    return {name: substituted(str(value), SECRETS) for name, value in given.items()}


def settings_of(service: Compose, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings as code inside that container would read them."""
    for name in [name for name in os.environ if name.startswith("PARAMPARA_")]:
        monkeypatch.delenv(name)
    for name, value in environment(service).items():
        if name.startswith("PARAMPARA_"):
            monkeypatch.setenv(name, value)
    return Settings()


def dockerfile_of(service: Compose) -> Path:
    return ROOT / service["build"]["dockerfile"]


def target_of(service: Compose) -> list[tuple[str, str]]:
    """Instructions of the stage that a service is built as: ``target``, else the last one."""
    target = service["build"].get("target")
    stages: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for instruction, rest in instructions(dockerfile_of(service)):
        if instruction == "FROM":
            words = rest.split()
            name = words[2] if len(words) == 3 else f"stage {len(stages)}"
            stages[name] = []
        elif name:
            stages[name].append((instruction, rest))
    return stages[target] if target else stages[name]


def command_of(service: Compose) -> list[str]:
    if "command" in service:
        return service["command"]
    return json.loads([rest for instruction, rest in target_of(service) if instruction == "CMD"][-1])


def probes_of(service: Compose) -> list[str]:
    """URLs that the image's HEALTHCHECK asks."""
    checks = [rest for instruction, rest in target_of(service) if instruction == "HEALTHCHECK"]
    return re.findall(r"http://[^\"' ]+", checks[-1]) if checks else []


def test_every_service_of_the_code_runs_and_only_those(compose: Compose) -> None:
    expected = {path.parent.name for path in (ROOT / "services").glob("*/pyproject.toml")} - {"standalone"}
    commands = {tuple(command_of(service)[1:3]) for service in ours(compose).values()}
    assert {module for _, module in commands} == expected | {"parampara.db.migrate"}


def test_commands_are_modules_that_can_be_run(compose: Compose) -> None:
    for name, service in ours(compose).items():
        python, flag, module, *arguments = command_of(service)
        assert (python, flag) == ("python", "-m"), name
        runnable = f"{module}.__main__" if "." not in module else module
        assert importlib.util.find_spec(runnable) is not None, f"{name}: python -m {module}"
        assert arguments[:1] in ([], ["serve"], ["worker"]), name


def test_every_queue_has_exactly_one_worker_service(compose: Compose) -> None:
    served = []
    for service in ours(compose).values():
        _, _, module, *arguments = command_of(service)
        if arguments == ["worker"]:
            source = (ROOT / "services" / module / "src" / module / "__main__.py").read_text(encoding="utf-8")
            served += re.findall(r'queue="(\w+)"', source)
    assert sorted(served) == sorted(set(QUEUES.values()))


def test_environment_variables_exist_in_the_settings(compose: Compose, variables: dict[str, Variable]) -> None:
    mappings = [name for name, variable in variables.items() if variable.is_mapping]
    for name, service in ours(compose).items():
        for variable in service["environment"]:
            if variable.startswith("PARAMPARA_"):
                assert variable in variables or any(variable.startswith(f"{mapping}__") for mapping in mappings), f"{name}: {variable}"


def test_every_setting_can_be_changed_or_is_wired(compose: Compose, variables: dict[str, Variable]) -> None:
    """A line in .env that no container hears would be a lie."""
    reached = {variable for service in ours(compose).values() for variable in service["environment"]}
    in_images = {"PARAMPARA_MODEL_SERVER__VLLM_COMMAND"}
    assert set(variables) - reached - in_images == set()


def test_every_container_reads_valid_settings(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, service in ours(compose).items():
        settings = settings_of(service, monkeypatch)
        assert settings.home == Path("/var/lib/parampara"), name
        assert settings.base_models == {"tiny-llama": "/models/tiny-llama"}, name


def test_addresses_name_services_and_their_ports(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(compose["services"]["gateway"], monkeypatch)
    listening = {name: settings_of(compose["services"][name], monkeypatch) for name in HTTP_SERVICES}
    expected = {
        settings.gateway.control_plane_url: ("control-plane", listening["control-plane"].control_plane.port),
        settings.gateway.embedder_url: ("embedder", listening["embedder"].embedder.port),
        settings.gateway.model_url: ("model-server", listening["model-server"].model_server.vllm_port),
        settings.model_server.url: ("model-server", listening["model-server"].model_server.port),
        settings.database.url: ("postgres", 5432),
        settings.redis.url: ("redis", 6379),
    }
    for url, (host, port) in expected.items():
        assert (urlsplit(url).hostname, urlsplit(url).port) == (host, port)
        assert host in compose["services"]


def test_http_services_listen_where_others_can_reach_them(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, section in HTTP_SERVICES.items():
        assert getattr(settings_of(compose["services"][name], monkeypatch), section).host == "0.0.0.0", name
    assert settings_of(compose["services"]["model-server"], monkeypatch).model_server.vllm_host == "model-server"


def test_health_checks_ask_the_port_that_is_served(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, service in ours(compose).items():
        if service.get("healthcheck", {}).get("disable"):
            continue
        settings = settings_of(service, monkeypatch)
        port = getattr(settings, HTTP_SERVICES[name]).port if name in HTTP_SERVICES else settings.worker.metrics_port
        assert [(urlsplit(url).port, urlsplit(url).path) for url in probes_of(service)] == [(port, "/readyz")], name


def test_health_check_paths_are_routes_of_the_code() -> None:
    for module in HTTP_SERVICES.values():
        sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "services" / module / "src").rglob("*.py"))
        assert re.search(r"[\"']/readyz[\"']", sources), module
    assert '"/readyz"' in (ROOT / "shared/src/parampara/telemetry.py").read_text(encoding="utf-8")


def test_services_share_the_networks_they_talk_over(compose: Compose) -> None:
    networks = {name: set(service["networks"]) for name, service in compose["services"].items()}
    for service in ours(compose):
        if service not in ("embedder", "model-server"):
            assert networks[service] & networks["postgres"], f"{service} cannot reach postgres"
    talks = [("gateway", "control-plane"), ("gateway", "embedder"), ("gateway", "model-server")]
    for caller, called in [*talks, ("ingestor", "embedder"), ("deployer", "model-server")]:
        assert networks[caller] & networks[called], f"{caller} cannot reach {called}"


def test_only_the_gateway_is_published_and_everything_else_is_internal(compose: Compose) -> None:
    """Besides it Grafana, where its profile is asked for (test_monitoring)."""
    services = {name: service for name, service in compose["services"].items() if name != "grafana"}
    assert [name for name, service in services.items() if service.get("ports")] == ["gateway"]
    assert all(port.startswith("${BIND_ADDRESS:-127.0.0.1}:") for port in services["gateway"]["ports"])
    outside = {name for name, network in compose["networks"].items() if not network.get("internal")}
    assert [name for name, service in services.items() if outside & set(service["networks"])] == ["gateway"]


def test_secrets_have_no_default(compose: Compose) -> None:
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    for name, operator, word in substitutions(text):
        if name in SECRETS:
            assert operator == ":?", f"{name} must be given"
            assert name in word, f"the message for {name} names it"
    holders = [name for name, service in ours(compose).items() if "PARAMPARA_KEY_PEPPER" in service["environment"]]
    assert sorted(holders) == ["control-plane", "gateway"], "only what checks keys holds the pepper"
    judging = [name for name, service in ours(compose).items() if "PARAMPARA_EVALUATOR__JUDGE_API_KEY" in service["environment"]]
    assert judging == ["evaluator"], "only what asks the judge holds the judge's key"


def test_containers_are_confined(compose: Compose) -> None:
    for name, service in ours(compose).items():
        assert service["user"] == "10001:10001", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("init") is None, f"{name}: the image has its own init"
    for name, service in compose["services"].items():
        assert service["logging"]["options"]["max-size"], f"{name}: logs would fill the disk"
        if name != "migrate":
            assert service["mem_limit"], name
            assert service["restart"] == "unless-stopped", name


def test_volumes_are_declared_and_workers_share_them(compose: Compose) -> None:
    for name, service in compose["services"].items():
        for mount in service.get("volumes", []):
            source = substituted(mount, {}).split(":")[0]
            assert source in compose["volumes"] or (ROOT / source).is_dir(), f"{name}: {source}"
    for name in ("trainer", "merger", "quantizer", "evaluator"):
        targets = [substituted(mount, {}).split(":")[1] for mount in compose["services"][name]["volumes"]]
        assert {f"/var/lib/parampara/{part}" for part in ("artifacts", "files", "work")} <= set(targets), name


def test_every_home_can_be_written(compose: Compose) -> None:
    """The root file system is read-only, and workers, control plane and model server each keep something in their home."""
    for name, service in ours(compose).items():
        if name not in ("gateway", "embedder", "migrate"):
            mounts = [substituted(mount, {}).split(":")[1:] for mount in service["volumes"]]
            assert ["/var/lib/parampara"] in mounts, name


def test_everything_waits_for_what_it_needs(compose: Compose) -> None:
    services = compose["services"]
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services, f"{name} waits for {needed}"
            if how["condition"] == "service_healthy":
                assert services[needed].get("healthcheck") or probes_of(services[needed]), f"{needed} has no health check"
    for name, service in ours(compose).items():
        if name not in ("migrate", "embedder", "model-server", "gateway"):
            assert service["depends_on"]["migrate"]["condition"] == "service_completed_successfully", name
    assert command_of(services["migrate"]) == ["python", "-m", "parampara.db.migrate"]


def test_the_gpu_override_changes_existing_services_only(compose: Compose, gpu: Compose) -> None:
    assert set(gpu["services"]) <= set(compose["services"])
    with_device = {name for name, service in gpu["services"].items() if "deploy" in service}
    assert with_device == {"trainer", "quantizer", "evaluator", "model-server"}
    for name, service in gpu["services"].items():
        build = {**compose["services"][name]["build"], **service.get("build", {})}
        known = {rest.split("=")[0] for instruction, rest in instructions(ROOT / build["dockerfile"]) if instruction == "ARG"}
        assert set(service.get("build", {}).get("args", {})) <= known, name


def test_build_arguments_exist_in_the_dockerfiles(compose: Compose) -> None:
    for name, service in ours(compose).items():
        known = {rest.split("=")[0] for instruction, rest in instructions(dockerfile_of(service)) if instruction == "ARG"}
        assert set(service["build"].get("args", {})) <= known, name


def test_one_container_fills_a_shared_home_before_the_others_are_created(compose: Compose) -> None:
    """Docker copies an image's folders into an empty volume for every container that mounts it; two at once can fail."""
    services = ours(compose)
    mounts = [(name, *mount.split(":")) for name, service in services.items() for mount in service.get("volumes", [])]
    homes = {name: volume for name, volume, target, *_ in mounts if target == HOME}
    for volume in set(homes.values()):
        sharing = {name for name, home in homes.items() if home == volume}
        first = [name for name in sharing if all(other == name or name in services[other]["depends_on"] for other in sharing)]
        assert len(first) == 1, (volume, sharing)


def test_redis_keeps_messages_and_refuses_instead_of_evicting(compose: Compose) -> None:
    script = compose["services"]["redis"]["command"][-1]
    for line in ("appendonly yes", "maxmemory-policy noeviction", "requirepass $$REDIS_PASSWORD"):
        assert line in script
    assert shlex.split(compose["services"]["redis"]["healthcheck"]["test"][1])[-1] == "PONG"


@pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not installed")
@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]], ids=["cpu", "gpu"])
def test_docker_compose_accepts_the_files(files: list[str], tmp_path: Path) -> None:
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0:
        pytest.skip("docker has no compose plugin")
    secrets = tmp_path / "secrets.env"
    secrets.write_text("".join(f"{name}={value}\n" for name, value in SECRETS.items()), encoding="utf-8")
    accepted = docker_compose_config(files, env_file=secrets)
    assert accepted.returncode == 0, accepted.stderr
    assert "PARAMPARA_BASE_MODELS__tiny-llama" in json.loads(accepted.stdout)["services"]["trainer"]["environment"]
    refused = docker_compose_config(files, env_file=Path(os.devnull))
    assert refused.returncode != 0
    assert "in .env" in refused.stderr, "the message says what to set and where"


def docker_compose_config(files: list[str], *, env_file: Path) -> subprocess.CompletedProcess[str]:
    named = [part for file in files for part in ("-f", file)]
    command = ["docker", "compose", "--env-file", str(env_file), *named, "config", "--format", "json"]
    clean = {name: value for name, value in os.environ.items() if name not in SECRETS}
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False, timeout=60)
