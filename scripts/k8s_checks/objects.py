"""Rendered manifests as the checks see them: objects, and the pods that their templates would make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

Object = dict[str, Any]
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob", "Pod")


@dataclass(frozen=True)
class Pod:
    """What one workload makes. ``owner`` is ``Kind/name``."""

    owner: str
    object: Object
    labels: Mapping[str, str]
    spec: Object

    @property
    def name(self) -> str:
        return self.owner.partition("/")[2]

    @property
    def main(self) -> list[Object]:
        return self.spec["containers"]

    @property
    def all_containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.main]

    def ports(self) -> dict[str, int]:
        """Named container ports."""
        return {port["name"]: port["containerPort"] for container in self.main for port in container.get("ports", [])}

    def claims(self) -> set[str]:
        """PersistentVolumeClaims that it mounts, templates of a StatefulSet not counted."""
        return {
            volume["persistentVolumeClaim"]["claimName"] for volume in self.spec.get("volumes", []) if "persistentVolumeClaim" in volume
        }


def parse(text: str) -> list[Object]:
    return [item for item in yaml.safe_load_all(text) if item]


def label(item: Object) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    return [item for item in objects if item["kind"] in kinds]


def by_name(objects: Sequence[Object], kind: str) -> dict[str, Object]:
    return {item["metadata"]["name"]: item for item in of_kind(objects, kind)}


def pods(objects: Sequence[Object]) -> list[Pod]:
    return [Pod(label(item), item, *_template(item)) for item in of_kind(objects, *WORKLOADS)]


def matches(selector: Object | None, labels: Mapping[str, str]) -> bool:
    """Kubernetes' label selector; an empty one takes everything, None nothing."""
    if selector is None:
        return False
    wanted = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return wanted and all(_holds(expression, labels) for expression in selector.get("matchExpressions", []))


def variables(container: Object, objects: Sequence[Object]) -> Iterator[tuple[str, str | Object]]:
    """``(name, value)`` of a container's environment in the order that counts; a value from elsewhere stays its reference."""
    maps = by_name(objects, "ConfigMap")
    for source in container.get("envFrom", []):
        yield from maps.get(source.get("configMapRef", {}).get("name", ""), {}).get("data", {}).items()
    for entry in container.get("env", []):
        yield entry["name"], entry.get("value", entry.get("valueFrom", ""))


def _template(item: Object) -> tuple[Mapping[str, str], Object]:
    if item["kind"] == "Pod":
        return item["metadata"].get("labels", {}), item["spec"]
    spec = item["spec"]["jobTemplate"]["spec"] if item["kind"] == "CronJob" else item["spec"]
    return spec["template"].get("metadata", {}).get("labels", {}), spec["template"]["spec"]


def _holds(expression: Object, labels: Mapping[str, str]) -> bool:
    key, values = expression["key"], expression.get("values", [])
    return {
        "In": labels.get(key) in values,
        "NotIn": labels.get(key) not in values,
        "Exists": key in labels,
        "DoesNotExist": key not in labels,
    }[expression["operator"]]
