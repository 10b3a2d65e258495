"""What one manifest names must exist in another: maps, claims, ports, selectors, scale targets, back ends, variables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from k8s_checks.objects import Object, Pod, by_name, label, matches, of_kind, pods, variables

_VARIABLE = re.compile(r"\$\((\w+)\)")


def faults(objects: Sequence[Object]) -> list[str]:
    """Every broken reference."""
    there = pods(objects)
    found = [*_twice(objects), *_services(objects, there), *_scalers(objects), *_routes(objects), *_monitors(objects, there)]
    found += [*_network_policies(objects, there), *_budgets(objects, there)]
    for pod in there:
        found += [f"{pod.owner}: {fault}" for fault in (*_of_pod(pod, objects), *_of_containers(pod, objects))]
    return found


def secrets(objects: Sequence[Object]) -> set[tuple[str, str]]:
    """``(name, key)`` of everything in Secrets that the manifests ask for."""
    used = {
        (value["secretKeyRef"]["name"], value["secretKeyRef"]["key"])
        for pod in pods(objects)
        for container in pod.all_containers
        for _, value in variables(container, objects)
        if isinstance(value, dict) and "secretKeyRef" in value
    }
    for item in of_kind(objects, "TriggerAuthentication"):
        used |= {(reference["name"], reference["key"]) for reference in item["spec"]["secretTargetRef"]}
    return used


def _twice(objects: Sequence[Object]) -> Iterator[str]:
    for name, count in Counter(label(item) for item in objects).items():
        if count > 1:
            yield f"{name} is defined {count} times"


def _of_pod(pod: Pod, objects: Sequence[Object]) -> Iterator[str]:
    for volume in pod.spec.get("volumes", []):
        name = volume.get("configMap", {}).get("name")
        if name and name not in by_name(objects, "ConfigMap"):
            yield f"ConfigMap {name} is not defined"
    for name in sorted(pod.claims() - set(by_name(objects, "PersistentVolumeClaim"))):
        yield f"PersistentVolumeClaim {name} is not defined"
    account = pod.spec.get("serviceAccountName", "default")
    if account != "default" and account not in by_name(objects, "ServiceAccount"):
        yield f"ServiceAccount {account} is not defined"
    if pod.object["kind"] == "StatefulSet" and pod.object["spec"]["serviceName"] not in by_name(objects, "Service"):
        yield f"Service {pod.object['spec']['serviceName']} is not defined"
    selector = pod.object["spec"].get("selector")
    if selector is not None and not matches(selector, pod.labels):
        yield "the selector does not match the pod's own labels"


def _of_containers(pod: Pod, objects: Sequence[Object]) -> Iterator[str]:
    templates = pod.object["spec"].get("volumeClaimTemplates", [])
    volumes = {volume["name"] for volume in pod.spec.get("volumes", [])} | {claim["metadata"]["name"] for claim in templates}
    for container in pod.all_containers:
        where = container["name"]
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{where}: mount {mount['name']} has no volume"
        paths = Counter(mount["mountPath"] for mount in container.get("volumeMounts", []))
        yield from (f"{where}: {path} is mounted twice" for path, count in paths.items() if count > 1)
        named = {port.get("name") for port in container.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            for how in ("httpGet", "tcpSocket"):
                port = container.get(probe, {}).get(how, {}).get("port")
                if isinstance(port, str) and port not in named:
                    yield f"{where}: {probe} asks port {port}, which the container lacks"
        for source in container.get("envFrom", []):
            name = source.get("configMapRef", {}).get("name")
            if name not in by_name(objects, "ConfigMap"):
                yield f"{where}: envFrom names ConfigMap {name}, which is not defined"
        yield from _expansions(container, objects)


def _expansions(container: Object, objects: Sequence[Object]) -> Iterator[str]:
    """``$(NAME)`` stays literally there unless NAME was set before."""
    known: set[str] = set()
    for name, value in variables(container, objects):
        if isinstance(value, str):
            for needed in _VARIABLE.findall(value):
                if needed not in known:
                    yield f"{container['name']}: {name} uses $({needed}), which is not set before it"
        known.add(name)
    names = Counter(entry["name"] for entry in container.get("env", []))
    yield from (f"{container['name']}: {name} is set twice" for name, count in names.items() if count > 1)


def _services(objects: Sequence[Object], there: Sequence[Pod]) -> Iterator[str]:
    for service in of_kind(objects, "Service"):
        behind = [pod for pod in there if matches({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        if len(behind) != 1:
            yield f"{label(service)}: its selector matches {len(behind)} workloads"
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            if any(target not in {**pod.ports()} and target not in pod.ports().values() for pod in behind):
                yield f"{label(service)}: targetPort {target} is no port of its pods"


def _scalers(objects: Sequence[Object]) -> Iterator[str]:
    targets: Counter[str] = Counter()
    for scaler in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        name = scaler["spec"]["scaleTargetRef"]["name"]
        targets[name] += 1
        if name not in by_name(objects, "Deployment"):
            yield f"{label(scaler)}: Deployment {name} is not defined"
        for trigger in scaler["spec"].get("triggers", []):
            wanted = trigger["authenticationRef"]["name"]
            if wanted not in by_name(objects, "TriggerAuthentication"):
                yield f"{label(scaler)}: TriggerAuthentication {wanted} is not defined"
    yield from (f"Deployment/{name} is scaled by {count} scalers" for name, count in targets.items() if count > 1)


def _routes(objects: Sequence[Object]) -> Iterator[str]:
    ports = {name: service["spec"]["ports"] for name, service in by_name(objects, "Service").items()}
    backends: list[tuple[str, str, str | int]] = []
    for ingress in of_kind(objects, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                service = path["backend"]["service"]
                port = service["port"]
                backends.append((label(ingress), service["name"], port.get("name", port.get("number"))))
    for route in of_kind(objects, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            backends += [(label(route), backend["name"], backend["port"]) for backend in rule["backendRefs"]]
    for who, name, wanted in backends:
        if not any(wanted in (port["name"], port["port"]) for port in ports.get(name, [])):
            yield f"{who}: Service {name} with port {wanted} is not defined"


def _monitors(objects: Sequence[Object], there: Sequence[Pod]) -> Iterator[str]:
    for monitor in of_kind(objects, "ServiceMonitor"):
        chosen = [item for item in of_kind(objects, "Service") if matches(monitor["spec"]["selector"], item["metadata"].get("labels", {}))]
        for endpoint in monitor["spec"]["endpoints"]:
            if not any(endpoint["port"] == port["name"] for item in chosen for port in item["spec"]["ports"]):
                yield f"{label(monitor)}: no Service that it selects has a port {endpoint['port']}"
    for monitor in of_kind(objects, "PodMonitor"):
        found = [pod for pod in there if matches(monitor["spec"]["selector"], pod.labels)]
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if not found or any(endpoint["port"] not in pod.ports() for pod in found):
                yield f"{label(monitor)}: not every pod that it selects has a port {endpoint['port']}"


def _network_policies(objects: Sequence[Object], there: Sequence[Pod]) -> Iterator[str]:
    """A policy that selects nothing protects nothing, and a peer that does not exist hides a missing flow."""
    for policy in of_kind(objects, "NetworkPolicy"):
        spec = policy["spec"]
        selectors = [spec["podSelector"]]
        for peer in [peer for rule in spec.get("ingress", []) for peer in rule.get("from", [])] + [
            peer for rule in spec.get("egress", []) for peer in rule.get("to", [])
        ]:
            if "podSelector" in peer and "namespaceSelector" not in peer:
                selectors.append(peer["podSelector"])
        for selector in selectors:
            if not any(matches(selector, pod.labels) for pod in there):
                yield f"{label(policy)}: the selector {selector} matches no pod"


def _budgets(objects: Sequence[Object], there: Sequence[Pod]) -> Iterator[str]:
    for budget in of_kind(objects, "PodDisruptionBudget"):
        if not any(matches(budget["spec"]["selector"], pod.labels) for pod in there):
            yield f"{label(budget)}: the selector {budget['spec']['selector']} matches no pod"
