"""The house rules for manifests: Pod Security "restricted" and a read-only root, sizes, probes, drains, no secret and no latest.

Pod Security's own rules: https://kubernetes.io/docs/concepts/security/pod-security-standards/ (restricted).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal

from k8s_checks.objects import Object, Pod, by_name, label, of_kind, pods, variables

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|PEPPER|CREDENTIAL|API_?KEY|__URL$")
_SECRET_VALUE = re.compile(r"://[^/\s@$]*:(?!\$\()[^/\s@]+@")
"""A URL with a password that is not ``$(VARIABLE)``."""
_CLUSTER_SCOPED = {"Namespace"}
_FORBIDDEN_KINDS = {"Secret", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "Pod", "DaemonSet"}
_UNITS = {"": 1, "m": Decimal("0.001"), "k": 1000, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def faults(objects: Sequence[Object]) -> list[str]:
    """Every rule on every object and pod."""
    found = [fault for rule in (_namespace, _kinds, _services, _literal_secrets, _replicas, _budgets) for fault in rule(objects)]
    for pod in pods(objects):
        for rule in _POD_RULES:
            found += [f"{pod.owner}: {fault}" for fault in rule(pod)]
        found += [f"{pod.owner}: {fault}" for fault in _rollout(pod, objects)]
    return found


def quantity(text: str | int) -> Decimal:
    """A Kubernetes quantity such as ``500m`` or ``2Gi`` as a number."""
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a quantity")
    return Decimal(match[1]) * _UNITS[match[2]]


def drain_seconds(container: Object) -> float:
    """How long a container's preStop hook sleeps."""
    hook = container.get("lifecycle", {}).get("preStop", {})
    command = hook.get("exec", {}).get("command", [])
    return float(command[1]) if command[:1] == ["sleep"] else float(hook.get("sleep", {}).get("seconds", 0))


def _images(pod: Pod) -> Iterator[str]:
    for container in pod.all_containers:
        name, _, digest = container["image"].partition("@")
        tag = name.rpartition("/")[2].partition(":")[2]
        if not digest and tag in ("", "latest"):
            yield f"{container['name']}: image {container['image']} has no version"
        if container.get("imagePullPolicy") == "Always":
            yield f"{container['name']}: imagePullPolicy Always makes a start depend on the registry"


def _sizes(pod: Pod) -> Iterator[str]:
    for container in pod.all_containers:
        resources = container.get("resources", {})
        requests, limits = resources.get("requests", {}), resources.get("limits", {})
        missing = [f"requests.{name}" for name in ("cpu", "memory") if name not in requests]
        missing += [] if "memory" in limits else ["limits.memory"]
        if missing:
            yield f"{container['name']}: resources lack {', '.join(missing)}"
        for name in set(requests) & set(limits):
            if quantity(requests[name]) > quantity(limits[name]):
                yield f"{container['name']}: requests more {name} than its limit"
    for volume in pod.spec.get("volumes", []):
        if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
            yield f"volume {volume['name']}: emptyDir without sizeLimit can fill the node's disk"


def _probes(pod: Pod) -> Iterator[str]:
    if pod.object["kind"] in ("Job", "CronJob"):
        return
    for container in pod.main:
        wanted = ("startupProbe", "readinessProbe", "livenessProbe") if container.get("ports") else ("readinessProbe",)
        for probe in wanted:
            if probe not in container:
                yield f"{container['name']}: no {probe}"


def _drain(pod: Pod) -> Iterator[str]:
    if pod.object["kind"] in ("Job", "CronJob"):
        return
    grace = pod.spec.get("terminationGracePeriodSeconds")
    if grace is None:
        yield "terminationGracePeriodSeconds is not set"
        return
    for container in pod.main:
        if drain_seconds(container) >= grace:
            yield f"{container['name']}: preStop takes the whole grace of {grace} s"


def _restricted(pod: Pod) -> Iterator[str]:
    spec = pod.spec
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield f"{field} is forbidden"
    for volume in spec.get("volumes", []):
        for kind in set(volume) - {"name"} - _VOLUMES:
            yield f"volume {volume['name']}: {kind} is forbidden"
    context = spec.get("securityContext", {})
    if not context.get("runAsNonRoot") or not context.get("runAsUser"):
        yield "securityContext needs runAsNonRoot and a runAsUser that is not 0"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "securityContext needs seccompProfile RuntimeDefault"
    for container in pod.all_containers:
        yield from (f"{container['name']}: {fault}" for fault in _confined(container))


def _confined(container: Object) -> Iterator[str]:
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation must be false"
    if context.get("readOnlyRootFilesystem") is not True:
        yield "readOnlyRootFilesystem must be true"
    capabilities = context.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield "capabilities must drop ALL and add none"
    if context.get("privileged") or context.get("runAsUser") == 0 or context.get("runAsNonRoot") is False or "procMount" in context:
        yield "privileged, root and procMount are forbidden"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "hostPort is forbidden"


def _account(pod: Pod) -> Iterator[str]:
    if pod.spec.get("serviceAccountName") in (None, "default"):
        yield "runs under the default service account"
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield "mounts a token for the Kubernetes API that it does not need"
    if pod.spec.get("enableServiceLinks") is not False:
        yield "enableServiceLinks must be false: it would put every Service's address into the environment"


def _cards(pod: Pod) -> Iterator[str]:
    wants = any("nvidia.com/gpu" in container.get("resources", {}).get("limits", {}) for container in pod.main)
    tolerates = any(toleration.get("key") == "nvidia.com/gpu" for toleration in pod.spec.get("tolerations", []))
    if wants and not tolerates:
        yield "wants a GPU but does not tolerate the taint nvidia.com/gpu"
    if tolerates and not wants:
        yield "tolerates the taint nvidia.com/gpu without wanting a GPU"


_POD_RULES: tuple[Callable[[Pod], Iterator[str]], ...] = (_images, _sizes, _probes, _drain, _restricted, _account, _cards)


def _namespace(objects: Sequence[Object]) -> Iterator[str]:
    namespaces = by_name(objects, "Namespace")
    for name, item in namespaces.items():
        if item["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"Namespace/{name}: Pod Security restricted is not enforced"
    for item in objects:
        if item["kind"] not in _CLUSTER_SCOPED and item["metadata"].get("namespace") not in namespaces:
            yield f"{label(item)}: namespace {item['metadata'].get('namespace')!r} is not one that is made here"


def _kinds(objects: Sequence[Object]) -> Iterator[str]:
    for item in of_kind(objects, *_FORBIDDEN_KINDS):
        yield f"{label(item)}: no {item['kind']} belongs into these manifests"


def _services(objects: Sequence[Object]) -> Iterator[str]:
    for item in of_kind(objects, "Service"):
        if item["spec"].get("type", "ClusterIP") != "ClusterIP" or item["spec"].get("externalIPs"):
            yield f"{label(item)}: only an Ingress or a Gateway publishes anything"


def _literal_secrets(objects: Sequence[Object]) -> Iterator[str]:
    for pod in pods(objects):
        for container in pod.all_containers:
            for name, value in variables(container, objects):
                if not isinstance(value, str):
                    continue
                named = _SECRET_NAME.search(name) and not name.endswith("__URL")
                if named or _SECRET_VALUE.search(value):
                    yield f"{pod.owner}: {container['name']}: {name} holds a secret in plain text"


def _replicas(objects: Sequence[Object]) -> Iterator[str]:
    """A number of replicas in the manifest would be set back at every apply."""
    for scaler in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        target = by_name(objects, "Deployment").get(scaler["spec"]["scaleTargetRef"]["name"], {})
        if "replicas" in target.get("spec", {}):
            yield f"{label(scaler)}: {label(target)} must not set replicas itself"


def _budgets(objects: Sequence[Object]) -> Iterator[str]:
    for budget in of_kind(objects, "PodDisruptionBudget"):
        if budget["spec"].get("maxUnavailable") in (0, "0%", None):
            yield f"{label(budget)}: needs maxUnavailable of at least 1, or a node can never be drained"


def _rollout(pod: Pod, objects: Sequence[Object]) -> Iterator[str]:
    """A second pod on another node would wait for ever for a card that is taken, or a volume that one node may mount."""
    if pod.object["kind"] != "Deployment":
        return
    strategy = pod.object["spec"].get("strategy", {})
    if strategy.get("type") == "Recreate" or strategy.get("rollingUpdate", {}).get("maxSurge") == 0:
        return
    claims = by_name(objects, "PersistentVolumeClaim")
    single = {name for name in pod.claims() if claims.get(name, {}).get("spec", {}).get("accessModes") == ["ReadWriteOnce"]}
    if single:
        yield f"a rolling update starts a second pod while {', '.join(sorted(single))} can be mounted on one node only"
    if any("nvidia.com/gpu" in container.get("resources", {}).get("limits", {}) for container in pod.main):
        yield "a rolling update starts a second pod while the first one holds the card"
