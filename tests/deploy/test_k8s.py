"""The Kubernetes manifests pass every check, and every check finds what it is there for."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from k8s_check import check
from k8s_checks import network, policy, references, rendering
from k8s_checks.objects import Object
from tests.deploy.deployment_files import ROOT

TARGETS = [target.name for target in rendering.targets()]
each_target = pytest.mark.parametrize("target", TARGETS)
Manifests = dict[str, list[Object]]

WORKERS = ("trainer", "merger", "quantizer", "evaluator", "ingestor", "deployer")
FLOWS = {
    (network.OUTSIDE, "gateway", 8000),
    ("gateway", "control-plane", 8001),
    ("gateway", "model-server", 8002),
    ("gateway", "embedder", 8003),
    ("ingestor", "embedder", 8003),
    ("deployer", "model-server", 8002),
    ("deployer", "model-server", 8004),
}
DATA_FLOWS = {
    *((client, "postgres", 5432) for client in ("migrate", "control-plane", "gateway", *WORKERS)),
    *((client, "redis", 6379) for client in ("control-plane", "gateway", *WORKERS)),
}


def test_the_overlays_are_those_that_are_promised() -> None:
    assert {target.name for target in rendering.targets() if target.parent.name == "overlays"} == {"cpu", "single-gpu", "multi-gpu"}


def test_every_component_is_used_by_an_overlay_or_an_example() -> None:
    """What nobody renders, nobody checks."""
    used = "".join((target / "kustomization.yaml").read_text(encoding="utf-8") for target in rendering.targets())
    for component in (ROOT / "k8s" / "components").iterdir():
        assert f"../../components/{component.name}\n" in used, component.name


@each_target
def test_every_target_passes(manifests: Manifests, target: str) -> None:
    assert check(manifests[target]) == []


@each_target
def test_exactly_the_connections_that_are_needed_are_open(manifests: Manifests, target: str) -> None:
    inside = any(item["metadata"]["name"] == "postgres" for item in manifests[target])
    assert network.flows(manifests[target]) == FLOWS | (DATA_FLOWS if inside else set())


@each_target
def test_nothing_reaches_the_internet(manifests: Manifests, target: str) -> None:
    ways_out = {to for _, to in network.open_egress(manifests[target])}
    assert ways_out <= {"kube-system", "10.20.0.0/24"}, "name resolution, and the databases of the example that has them elsewhere"


def test_placeholder_networks_reach_nothing() -> None:
    text = (ROOT / "k8s/components/external-data/network-policies.yaml").read_text(encoding="utf-8")
    assert text.count("cidr: 192.0.2.0/24") == 2, "an address range that is nobody's (RFC 5737)"


def test_a_secret_may_come_from_a_file_that_git_ignores(manifests: Manifests, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "k8s/secrets", tmp_path, dirs_exist_ok=True)
    example = (tmp_path / "parampara.env.example").read_text(encoding="utf-8")
    assert re.findall(r"^\w+=.+$", example, re.MULTILINE) == [], "an example password would become a real one"
    (tmp_path / "parampara.env").write_text(re.sub(r"^#?(\w+)=$", r"\1=given", example, flags=re.MULTILINE), encoding="utf-8")
    [secret] = rendering.render(tmp_path)
    assert (secret["metadata"]["namespace"], secret["metadata"]["name"]) == ("parampara", "parampara")
    used = {key for objects in manifests.values() for name, key in references.secrets(objects) if name == "parampara"}
    assert set(secret["data"]) == used
    assert "k8s/secrets/*.env" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def find(objects: list[Object], name: str) -> Object:
    kind, _, name = name.partition("/")
    return next(item for item in objects if item["kind"] == kind and item["metadata"]["name"] == name)


def pod(objects: list[Object], name: str = "Deployment/trainer") -> Object:
    return find(objects, name)["spec"]["template"]["spec"]


def container(objects: list[Object], name: str = "Deployment/trainer") -> Object:
    return pod(objects, name)["containers"][0]


def drop(objects: list[Object], name: str) -> None:
    objects.remove(find(objects, name))


MUTATIONS: dict[str, tuple[Callable[[list[Object]], object], str]] = {
    "unknown field": (lambda o: container(o).update(imagePullPolice="Always"), "imagePullPolice"),
    "wrong type": (lambda o: pod(o).update(terminationGracePeriodSeconds="ninety"), "is not of type 'integer'"),
    "no schema": (lambda o: find(o, "Deployment/trainer").update(apiVersion="apps/v9"), "has no apps/v9 Deployment"),
    "too new": (lambda o: pod(o).update(hostUsers=False, resources={}), "Kubernetes 1.27"),
    "custom unknown field": (lambda o: find(o, "ScaledObject/trainer")["spec"].update(minReplicas=0), "minReplicas"),
    "custom number as number": (
        lambda o: find(o, "ScaledObject/trainer")["spec"]["triggers"][0]["metadata"].update(targetQueryValue=1),
        "1 is not of type 'string'",
    ),
    "latest": (lambda o: container(o).update(image="parampara/trainer:latest"), "has no version"),
    "no tag": (lambda o: container(o).update(image="registry:5000/parampara/trainer"), "has no version"),
    "no request": (lambda o: container(o)["resources"]["requests"].pop("cpu"), "resources lack requests.cpu"),
    "no limit": (lambda o: container(o)["resources"]["limits"].pop("memory"), "resources lack limits.memory"),
    "request above limit": (lambda o: container(o)["resources"]["requests"].update(memory="65Gi"), "more memory than its limit"),
    "unlimited emptyDir": (lambda o: pod(o)["volumes"].append({"name": "x", "emptyDir": {}}), "without sizeLimit"),
    "no probe": (lambda o: container(o).pop("startupProbe"), "no startupProbe"),
    "no grace": (lambda o: pod(o).pop("terminationGracePeriodSeconds"), "terminationGracePeriodSeconds is not set"),
    "grace slept away": (lambda o: pod(o, "Deployment/gateway").update(terminationGracePeriodSeconds=45), "whole grace of 45 s"),
    "host network": (lambda o: pod(o).update(hostNetwork=True), "hostNetwork is forbidden"),
    "host path": (lambda o: pod(o)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), "hostPath is forbidden"),
    "root": (lambda o: pod(o)["securityContext"].update(runAsUser=0), "runAsUser that is not 0"),
    "no seccomp": (lambda o: pod(o)["securityContext"].pop("seccompProfile"), "seccompProfile"),
    "escalation": (lambda o: container(o)["securityContext"].pop("allowPrivilegeEscalation"), "allowPrivilegeEscalation"),
    "writable root": (lambda o: pod(o)["initContainers"][0].pop("securityContext"), "schema: readOnlyRootFilesystem"),
    "capability": (lambda o: container(o)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]), "add none"),
    "privileged": (lambda o: container(o)["securityContext"].update(privileged=True), "privileged"),
    "host port": (lambda o: container(o)["ports"][0].update(hostPort=9100), "hostPort is forbidden"),
    "default account": (lambda o: pod(o).update(serviceAccountName="default"), "default service account"),
    "token": (lambda o: pod(o).pop("automountServiceAccountToken"), "token for the Kubernetes API"),
    "service links": (lambda o: pod(o).pop("enableServiceLinks"), "enableServiceLinks"),
    "no toleration": (lambda o: pod(o).pop("tolerations"), "does not tolerate"),
    "needless toleration": (lambda o: container(o)["resources"]["limits"].pop("nvidia.com/gpu"), "without wanting a GPU"),
    "surge on a card": (lambda o: find(o, "Deployment/trainer")["spec"].pop("strategy"), "holds the card"),
    "surge on a volume": (lambda o: find(o, "Deployment/control-plane")["spec"].pop("strategy"), "on one node only"),
    "pod security": (lambda o: find(o, "Namespace/parampara")["metadata"].pop("labels"), "restricted is not enforced"),
    "namespace": (lambda o: find(o, "Service/gateway")["metadata"].update(namespace="default"), "namespace 'default'"),
    "a Secret": (lambda o: o.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}), "no Secret belongs"),
    "node port": (lambda o: find(o, "Service/gateway")["spec"].update(type="NodePort"), "only an Ingress or a Gateway"),
    "plain password": (lambda o: container(o)["env"].append({"name": "DB_PASSWORD", "value": "x"}), "DB_PASSWORD holds a secret"),
    "plain URL": (lambda o: container(o)["env"].append({"name": "X", "value": "redis://:pw@redis"}), "X holds a secret"),
    "replicas": (lambda o: find(o, "Deployment/gateway")["spec"].update(replicas=3), "must not set replicas"),
    "blocking budget": (lambda o: find(o, "PodDisruptionBudget/gateway")["spec"].update(maxUnavailable=0), "never be drained"),
    "twice": (lambda o: o.append(find(o, "Service/gateway")), "defined 2 times"),
    "no claim": (lambda o: drop(o, "PersistentVolumeClaim/work"), "PersistentVolumeClaim work is not defined"),
    "no account": (lambda o: drop(o, "ServiceAccount/parampara"), "ServiceAccount parampara is not defined"),
    "no settings": (lambda o: o.remove(next(i for i in o if i["kind"] == "ConfigMap")), "ConfigMap settings-"),
    "no governing Service": (lambda o: drop(o, "Service/postgres"), "Service postgres is not defined"),
    "no volume": (lambda o: pod(o)["volumes"].pop(), "has no volume"),
    "mounted twice": (lambda o: container(o)["volumeMounts"].append({"name": "tmp", "mountPath": "/models"}), "/models is mounted twice"),
    "probe port": (lambda o: container(o)["livenessProbe"]["httpGet"].update(port="http"), "asks port http"),
    "variable before its use": (lambda o: container(o)["env"].reverse(), "which is not set before it"),
    "variable twice": (lambda o: container(o)["env"].append({"name": "REDIS_PASSWORD", "value": "$(X)"}), "is set twice"),
    "pod selector": (lambda o: find(o, "Deployment/trainer")["spec"]["selector"]["matchLabels"].update(x="y"), "own labels"),
    "Service selector": (lambda o: find(o, "Service/gateway")["spec"]["selector"].update(x="y"), "matches 0 workloads"),
    "target port": (lambda o: find(o, "Service/gateway")["spec"]["ports"][0].update(targetPort="web"), "targetPort web"),
    "scale target": (lambda o: drop(o, "Deployment/trainer"), "Deployment trainer is not defined"),
    "scaled twice": (lambda o: find(o, "ScaledObject/trainer")["spec"]["scaleTargetRef"].update(name="gateway"), "by 2 scalers"),
    "authentication": (lambda o: drop(o, "TriggerAuthentication/jobs"), "TriggerAuthentication jobs is not defined"),
    "idle policy": (
        lambda o: find(o, "NetworkPolicy/redis")["spec"]["podSelector"]["matchLabels"].update(x="y"),
        "NetworkPolicy/redis: the selector",
    ),
    "idle peer": (
        lambda o: find(o, "NetworkPolicy/redis")["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"].update(x="y"),
        "NetworkPolicy/redis: the selector",
    ),
    "idle budget": (lambda o: find(o, "PodDisruptionBudget/workers")["spec"]["selector"]["matchLabels"].update(x="y"), "matches no pod"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_manifest_is_named(manifests: Manifests, name: str) -> None:
    mutate, expected = MUTATIONS[name]
    objects = copy.deepcopy(manifests["single-gpu"])
    mutate(objects)
    faults = check(objects)
    assert any(expected in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("target", "name", "mutate", "expected"),
    [
        ("small-with-ingress", "Ingress/gateway", lambda i: i["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"].update(name="x"), "Service x"),
        ("managed-data", "HTTPRoute/gateway", lambda i: i["spec"]["rules"][0]["backendRefs"][0].update(port=80), "port 80 is not defined"),
        ("managed-data", "HTTPRoute/gateway", lambda i: i["spec"]["rules"][0]["timeouts"].update(request="forever"), "does not match"),
        ("managed-data", "ServiceMonitor/vllm", lambda i: i["spec"]["endpoints"][0].update(port="x"), "has a port x"),
        ("managed-data", "PodMonitor/workers", lambda i: i["spec"]["selector"]["matchLabels"].update(x="y"), "not every pod"),
    ],
)  # fmt: skip
def test_a_broken_route_or_monitor_is_named(
    manifests: Manifests, target: str, name: str, mutate: Callable[[Object], object], expected: str
) -> None:
    objects = copy.deepcopy(manifests[target])
    mutate(find(objects, name))
    faults = check(objects)
    assert any(expected in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("policy_name", "opened", "closed"),
    [
        ("default-deny", (network.OUTSIDE, "trainer", 9100), None),
        ("model-server", None, ("deployer", "model-server", 8004)),
        ("gateway", None, (network.OUTSIDE, "gateway", 8000)),
        ("redis-clients", None, ("trainer", "redis", 6379)),
        ("postgres", None, ("migrate", "postgres", 5432)),
    ],
)
def test_a_missing_network_policy_changes_who_may_talk(
    manifests: Manifests, policy_name: str, opened: network.Flow | None, closed: network.Flow | None
) -> None:
    objects = copy.deepcopy(manifests["cpu"])
    before = network.flows(objects)
    drop(objects, f"NetworkPolicy/{policy_name}")
    after = network.flows(objects)
    assert opened is None or opened in after - before
    assert closed is None or closed in before - after


def test_without_default_deny_the_way_out_is_open(manifests: Manifests) -> None:
    objects = copy.deepcopy(manifests["cpu"])
    drop(objects, "NetworkPolicy/default-deny")
    drop(objects, "NetworkPolicy/dns")
    assert ("embedder", "anywhere") in network.open_egress(objects)


def test_quantities_are_numbers() -> None:
    assert policy.quantity("500m") * 2 == policy.quantity(1)
    assert policy.quantity("1Gi") == 1024 * policy.quantity("1Mi")
    with pytest.raises(ValueError, match="not a quantity"):
        policy.quantity("1 GB")


def k8s_check(*arguments: str | Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({"PATH": path} if path is not None else {})}
    command = [sys.executable, ROOT / "scripts/k8s_check.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=100)


def test_the_script_says_what_to_install_where_nothing_renders(tmp_path: Path) -> None:
    outcome = k8s_check(path=str(tmp_path))
    assert outcome.returncode == 2
    assert "Install one of them" in outcome.stderr


def test_the_script_accepts_a_good_overlay_and_names_what_is_wrong_with_another(manifests: Manifests, tmp_path: Path) -> None:
    base = os.path.relpath(ROOT / "k8s/overlays/cpu", tmp_path)
    own = tmp_path / "kustomization.yaml"
    own.write_text(f"resources: [{base}]\n", encoding="utf-8")
    assert k8s_check(tmp_path).returncode == 0
    own.write_text(f"resources: [{base}]\nimages: [{{name: parampara/gateway, newTag: latest}}]\n", encoding="utf-8")
    outcome = k8s_check(tmp_path)
    assert outcome.returncode == 1
    assert "policy: Deployment/gateway: gateway: image parampara/gateway:latest has no version" in outcome.stderr
    own.write_text(f"resources: [{base}, missing.yaml]\n", encoding="utf-8")
    outcome = k8s_check(tmp_path)
    assert outcome.returncode == 1
    assert "missing.yaml" in outcome.stderr
