"""The Kubernetes manifests agree with the code and with compose: commands, images, settings, ports, probes, queues, volumes, grace, sizes."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import control_plane.server
import gateway.__main__
import model_server.engine
from gateway.passthrough import PREFIXES
from k8s_checks import references, rendering
from k8s_checks.objects import Object, Pod, by_name, of_kind, pods, variables
from k8s_checks.policy import drain_seconds, quantity
from parampara.plan import QUEUES
from parampara.settings import Settings
from tests.deploy.conftest import Variable
from tests.deploy.deployment_files import ROOT, substituted
from tests.deploy.test_compose import HTTP_SERVICES, Compose, command_of, ours, target_of

each_target = pytest.mark.parametrize("target", [target.name for target in rendering.targets()])
on_gpus = pytest.mark.parametrize("target", ["single-gpu", "multi-gpu"])
Manifests = dict[str, list[Object]]
VERSION = tomllib.loads((ROOT / "shared/pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
OF_THEIR_OWN = {"model-loader", "postgres", "redis"}
DRAIN_SECONDS = 5
"""What a process may need after its own grace to end: closing pools, writing the last row."""


def workloads(objects: list[Object]) -> dict[str, Pod]:
    """Those that stand for a service of compose which is built from this repository."""
    return {pod.name: pod for pod in pods(objects) if pod.name not in OF_THEIR_OWN}


def environment(container: Object, objects: list[Object]) -> dict[str, str]:
    """What the container's processes see, with ``secret`` for each secret."""
    seen: dict[str, str] = {}
    for name, value in variables(container, objects):
        given = value if isinstance(value, str) else "redis://secret" if "REDIS__URL" in name else "secret"
        seen[name] = re.sub(r"\$\((\w+)\)", lambda match: seen[match[1]], given)
    return seen


def settings_of(pod: Pod, objects: list[Object], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings as code inside that pod would read them."""
    for name in [name for name in os.environ if name.startswith("PARAMPARA_")]:
        monkeypatch.delenv(name)
    for name, value in environment(pod.main[0], objects).items():
        if name.startswith("PARAMPARA_"):
            monkeypatch.setenv(name, value)
    return Settings()


def probes(pod: Pod) -> Iterator[tuple[str, int, str]]:
    """``(probe, port, path)`` of every probe over HTTP."""
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = pod.main[0][probe]["httpGet"]
        yield probe, pod.ports()[asked["port"]], asked["path"]


@each_target
def test_every_service_of_compose_has_its_workload(manifests: Manifests, compose: Compose, target: str) -> None:
    assert set(workloads(manifests[target])) == set(ours(compose))


@each_target
def test_commands_are_those_of_compose(manifests: Manifests, compose: Compose, target: str) -> None:
    for name, pod in workloads(manifests[target]).items():
        assert pod.main[0]["args"] == command_of(ours(compose)[name]), name
        assert "command" not in pod.main[0], f"{name}: the image's entrypoint stays"


@each_target
def test_images_are_those_of_compose_in_this_version(manifests: Manifests, compose: Compose, gpu: Compose, target: str) -> None:
    for name, pod in workloads(manifests[target]).items():
        wants_card = "nvidia.com/gpu" in pod.main[0]["resources"]["limits"]
        wanted, _, variant = (gpu if wants_card else compose)["services"][name]["image"].partition(":")
        image, _, tag = pod.main[0]["image"].rpartition(":")
        assert image.removeprefix("registry.example.com/") == wanted, name
        assert tag == "-".join(filter(None, [VERSION, variant])), name
        for waiting in pod.spec.get("initContainers", []):
            assert waiting["image"].rpartition(":")[2] == VERSION, name


def test_postgres_and_redis_are_those_of_compose(manifests: Manifests, compose: Compose) -> None:
    data = {pod.name: pod.main[0] for pod in pods(manifests["cpu"]) if pod.object["kind"] == "StatefulSet"}
    assert {name: container["image"] for name, container in data.items()} == {
        name: compose["services"][name]["image"] for name in ("postgres", "redis")
    }
    script = compose["services"]["redis"]["command"][-1].replace("$$", "$")
    assert data["redis"]["args"] == ["sh", "-ec", script]


@each_target
def test_users_are_those_of_the_images(manifests: Manifests, compose: Compose, target: str) -> None:
    for name, pod in workloads(manifests[target]).items():
        users = [rest for instruction, rest in target_of(ours(compose)[name]) if instruction == "USER"]
        context = pod.spec["securityContext"]
        assert users[-1] == f"{context['runAsUser']}:{context['runAsGroup']}", name


@each_target
def test_environment_variables_exist_in_the_settings(manifests: Manifests, variables: dict[str, Variable], target: str) -> None:
    for name, pod in workloads(manifests[target]).items():
        for container in pod.all_containers:
            given = {variable for variable in environment(container, manifests[target]) if variable.startswith("PARAMPARA_")}
            assert given <= set(variables), f"{name}: {container['name']}"


@each_target
def test_every_pod_reads_valid_settings(manifests: Manifests, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, pod in workloads(manifests[target]).items():
        settings = settings_of(pod, manifests[target], monkeypatch)
        assert settings.home == Path("/var/lib/parampara"), name
        assert all(path.startswith("/models/") for path in settings.base_models.values()), name


@each_target
def test_addresses_name_services_and_the_ports_behind_them(manifests: Manifests, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = manifests[target]
    there, services = workloads(objects), by_name(objects, "Service")
    settings = settings_of(there["gateway"], objects, monkeypatch)
    expected = {
        settings.gateway.control_plane_url: ("control-plane", settings.control_plane.port),
        settings.gateway.embedder_url: ("embedder", settings.embedder.port),
        settings.gateway.model_url: ("model-server", settings.model_server.vllm_port),
        settings.model_server.url: ("model-server", settings.model_server.port),
    }
    if "postgres" in services:
        expected |= {settings.database.url: ("postgres", 5432), settings.redis.url: ("redis", 6379)}
    for url, (host, port) in expected.items():
        assert (urlsplit(url).hostname, urlsplit(url).port) == (host, port)
        [entry] = [entry for entry in services[host]["spec"]["ports"] if entry["port"] == port]
        [pod] = [pod for pod in pods(objects) if pod.name == host]
        assert pod.ports()[entry["targetPort"]] == port


@each_target
def test_servers_listen_where_others_can_reach_them(manifests: Manifests, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = manifests[target]
    for name, section in HTTP_SERVICES.items():
        pod = workloads(objects)[name]
        listening = getattr(settings_of(pod, objects, monkeypatch), section)
        assert (listening.host, listening.port) == ("0.0.0.0", pod.ports()["http"]), name
    server = workloads(objects)["model-server"]
    listening = settings_of(server, objects, monkeypatch).model_server
    assert (listening.vllm_host, listening.vllm_port) == (server.spec["hostname"], server.ports()["vllm"]), (
        "vLLM binds to its pod's own name"
    )


@each_target
def test_probes_ask_the_port_that_is_served(manifests: Manifests, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = manifests[target]
    for name, pod in workloads(objects).items():
        if name == "migrate":
            continue
        settings = settings_of(pod, objects, monkeypatch)
        port = getattr(settings, HTTP_SERVICES[name]).port if name in HTTP_SERVICES else settings.worker.metrics_port
        for probe, asked, path in probes(pod):
            assert asked == port, f"{name}: {probe}"
            assert path in ({"/livez"} if probe == "livenessProbe" else {"/readyz"} if probe == "readinessProbe" else {"/livez", "/readyz"})


def test_probe_paths_are_routes_of_the_code() -> None:
    for module in HTTP_SERVICES.values():
        sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "services" / module / "src").rglob("*.py"))
        assert {"/livez", "/readyz", "/metrics"} <= set(re.findall(r"[\"'](/\w+)[\"']", sources)), module
    telemetry = (ROOT / "shared/src/parampara/telemetry.py").read_text(encoding="utf-8")
    assert {"/livez", "/readyz", "/metrics"} <= set(re.findall(r'"(/\w+)"', telemetry))


@each_target
def test_every_queue_has_exactly_one_worker_and_is_scaled_by_its_own_jobs(manifests: Manifests, target: str) -> None:
    objects = manifests[target]
    queue_of = {}
    for name, pod in workloads(objects).items():
        _, _, module, *arguments = pod.main[0]["args"]
        if arguments == ["worker"]:
            source = (ROOT / "services" / module / "src" / module / "__main__.py").read_text(encoding="utf-8")
            [queue_of[name]] = re.findall(r'queue="(\w+)"', source)
    assert sorted(queue_of.values()) == sorted(set(QUEUES.values()))
    for scaler in of_kind(objects, "ScaledObject"):
        scaled = scaler["spec"]["scaleTargetRef"]["name"]
        if scaled in queue_of:
            query = scaler["spec"]["triggers"][0]["metadata"]["query"]
            assert re.findall(r"queue = '(\w+)'", query) == [queue_of[scaled]], scaled


@each_target
def test_grace_is_longer_than_what_the_code_takes_to_stop(manifests: Manifests, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = manifests[target]
    own = {
        "gateway": gateway.__main__.GRACE_SECONDS,
        "control-plane": 2 * control_plane.server._GRACE_SECONDS,  # requests first, then the reconciler
        "model-server": model_server.engine.STOP_SECONDS,
        "embedder": DRAIN_SECONDS,
    }
    for name, pod in workloads(objects).items():
        if name == "migrate":
            continue
        takes = own.get(name, settings_of(pod, objects, monkeypatch).worker.stop_grace_seconds)
        assert pod.spec["terminationGracePeriodSeconds"] >= drain_seconds(pod.main[0]) + takes + DRAIN_SECONDS, name
        if name in HTTP_SERVICES:
            assert drain_seconds(pod.main[0]) >= DRAIN_SECONDS, f"{name}: requests still come while the endpoints are taken away"


@each_target
def test_stages_leave_no_zombies(manifests: Manifests, compose: Compose, gpu: Compose, target: str) -> None:
    """The entrypoint of the images reaps them, as PID 1 only: in a shared process namespace that is the pause process."""
    for name, pod in workloads(manifests[target]).items():
        assert not pod.spec.get("shareProcessNamespace"), name
        wants_card = "nvidia.com/gpu" in pod.main[0]["resources"]["limits"]
        built = (gpu if wants_card else compose)["services"][name].get("build", {}).get("dockerfile") or ours(compose)[name]["build"][
            "dockerfile"
        ]
        assert 'ENTRYPOINT ["tini", "--"]' in (ROOT / built).read_text(encoding="utf-8"), name


@each_target
def test_a_late_probe_takes_nobody_the_database_or_the_broker(manifests: Manifests, target: str) -> None:
    for name, service in by_name(manifests[target], "Service").items():
        if name in ("postgres", "redis"):
            assert service["spec"].get("publishNotReadyAddresses") is True, name


@each_target
def test_volumes_are_those_of_compose(manifests: Manifests, compose: Compose, target: str) -> None:
    for name, pod in workloads(manifests[target]).items():
        if name == "migrate":  # in compose it only fills a new volume, which is Docker's way
            continue
        claims = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in pod.spec["volumes"]
            if "persistentVolumeClaim" in volume
        }
        mounts = {mount["mountPath"]: mount for mount in pod.main[0]["volumeMounts"] if mount["name"] in claims}
        for entry in ours(compose)[name].get("volumes", []):
            source, path, *mode = substituted(entry, {}).split(":")
            inside = mounts.get("/models" if path.startswith("/models/") else path)
            assert inside is not None, f"{name}: {path}"
            assert inside.get("readOnly", False) == (mode == ["ro"]), f"{name}: {path}"
            if source in compose["volumes"] and not path.startswith("/models/"):
                assert claims[inside["name"]] == source, f"{name}: {path}"
        assert len(mounts) <= len(ours(compose)[name].get("volumes", [])), name
        assert "/tmp" in {mount["mountPath"] for mount in pod.main[0]["volumeMounts"]}, name


@pytest.mark.parametrize("target", ["cpu", "single-gpu", "multi-gpu"])
def test_memory_limits_are_those_of_compose(manifests: Manifests, compose: Compose, gpu: Compose, target: str) -> None:
    for pod in pods(manifests[target]):
        if pod.name in ("migrate", "model-loader"):
            continue
        override = {} if target == "cpu" else gpu["services"].get(pod.name, {})
        wanted = substituted(override.get("mem_limit", compose["services"][pod.name]["mem_limit"]), {})
        assert quantity(pod.main[0]["resources"]["limits"]["memory"]) == quantity(wanted.upper() + "i"), pod.name


@on_gpus
def test_the_same_services_get_a_card_as_in_compose(manifests: Manifests, gpu: Compose, target: str) -> None:
    holders = {pod.name for pod in pods(manifests[target]) if "nvidia.com/gpu" in pod.main[0]["resources"]["limits"]}
    assert holders == {name for name, service in gpu["services"].items() if "deploy" in service}
    settings = of_kind(manifests[target], "ConfigMap")[0]["data"]
    assert settings["PARAMPARA_MODEL_SERVER__CPU"] == "false"


@on_gpus
def test_stages_on_a_card_scale_to_none(manifests: Manifests, target: str) -> None:
    scaled = by_name(manifests[target], "ScaledObject")
    for name in ("trainer", "quantizer", "evaluator"):
        assert scaled[name]["spec"]["minReplicaCount"] == 0, name


def test_one_card_is_never_asked_for_twice_by_one_kind(manifests: Manifests) -> None:
    objects = manifests["single-gpu"]
    scaled = by_name(objects, "ScaledObject")
    for pod in pods(objects):
        if "nvidia.com/gpu" in pod.main[0]["resources"]["limits"]:
            spec = scaled[pod.name]["spec"]
            assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 1), pod.name
            assert spec["cooldownPeriod"] <= 10, f"{pod.name} must let go of the card soon"
    waits = [container["name"] for container in workloads(objects)["deployer"].spec["initContainers"]]
    assert waits == ["schema", "model-server"], "a deployment waits until the model server has the card"
    script = workloads(objects)["deployer"].spec["initContainers"][1]["args"][-1]
    asked = re.findall(r"(/\S+\.py) (http://\S+?);", script)
    assert asked == [("/opt/healthcheck.py", "http://model-server:8004/readyz")]
    assert "COPY docker/healthcheck.py /opt/healthcheck.py" in (ROOT / "docker/model_server/Dockerfile").read_text(encoding="utf-8")


@each_target
def test_only_what_checks_keys_holds_the_pepper(manifests: Manifests, target: str) -> None:
    holders = {
        name for name, pod in workloads(manifests[target]).items() if "PARAMPARA_KEY_PEPPER" in environment(pod.main[0], manifests[target])
    }
    assert holders == {"control-plane", "gateway"}


@each_target
def test_secrets_are_those_that_the_readme_makes(manifests: Manifests, target: str) -> None:
    text = (ROOT / "k8s/README.md").read_text(encoding="utf-8")
    made: set[tuple[str, str]] = set()
    for name, arguments in re.findall(r"create secret generic (\S+) ((?:\\\n|[^\n])*)", text):
        made |= {(name, key) for key in re.findall(r"--from-literal=(\w+)=", arguments)}
    assert references.secrets(manifests[target]) <= made


def test_no_route_from_outside_leads_to_metrics_and_every_public_one_does(manifests: Manifests) -> None:
    [ingress] = of_kind(manifests["small-with-ingress"], "Ingress")
    [route] = of_kind(manifests["managed-data"], "HTTPRoute")
    paths = {path["path"] for path in ingress["spec"]["rules"][0]["http"]["paths"]}
    assert paths == {match["path"]["value"] for match in route["spec"]["rules"][0]["matches"]}
    assert paths == {"/v1", "/docs", "/openapi.json", "/health"}
    assert all(prefix.startswith("/v1/") for prefix in PREFIXES)


def test_streams_and_uploads_pass_the_ingress(manifests: Manifests) -> None:
    [ingress] = of_kind(manifests["small-with-ingress"], "Ingress")
    nginx = {key.rpartition("/")[2]: value for key, value in ingress["metadata"]["annotations"].items()}
    defaults = Settings.model_fields["gateway"].default
    assert nginx["proxy-buffering"] == "off"
    assert int(nginx["proxy-read-timeout"]) > defaults.total_seconds
    upload = Settings.model_fields["max_upload_bytes"].default
    assert int(nginx["proxy-body-size"].removesuffix("m")) * 2**20 > upload
    [route] = of_kind(manifests["managed-data"], "HTTPRoute")
    assert route["spec"]["rules"][0]["timeouts"]["request"] == "1h" and defaults.total_seconds < 3600


@pytest.mark.parametrize("target", ["managed-data", "small-with-ingress"])
def test_every_service_is_scraped(manifests: Manifests, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monitors = by_name(manifests[target], "ServiceMonitor")
    inside = set(monitors["parampara"]["spec"]["selector"]["matchExpressions"][0]["values"])
    pods = by_name(manifests[target], "PodMonitor")
    with_keys = set(pods["api"]["spec"]["selector"]["matchExpressions"][0]["values"])  # these ask for one on their API port
    assert (with_keys, inside | with_keys) == ({"control-plane", "gateway"}, set(HTTP_SERVICES))
    for name in with_keys:
        pod = workloads(manifests[target])[name]
        listening = getattr(settings_of(pod, manifests[target], monkeypatch), HTTP_SERVICES[name])
        assert (listening.metrics_host, listening.metrics_port) == ("0.0.0.0", pod.ports()["metrics"])
    assert "workers" in pods
