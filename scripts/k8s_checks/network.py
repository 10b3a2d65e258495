"""Who may talk to whom under the NetworkPolicies, worked out as the API defines them: policies add up, and both ends must allow.

https://kubernetes.io/docs/concepts/services-networking/network-policies/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from k8s_checks.objects import Object, Pod, matches, of_kind, pods

OUTSIDE = "outside"
"""Anything outside the namespace and not named by a policy: other namespaces, other networks."""
Flow = tuple[str, str, int]


@dataclass(frozen=True)
class Peer:
    """One end of a connection; without a pod it is outside the namespace."""

    name: str
    pod: Pod | None = None


def flows(objects: Sequence[Object]) -> set[Flow]:
    """``(from, to, port)`` of every connection to a container port that is allowed, :data:`OUTSIDE` as a source included."""
    policies = of_kind(objects, "NetworkPolicy")
    there = [Peer(pod.name, pod) for pod in pods(objects)]
    return {
        (source.name, target.name, number)
        for target in there
        if target.pod is not None
        for name, number in target.pod.ports().items()
        for source in [*there, Peer(OUTSIDE)]
        if source.name != target.name and _in(policies, source, target.pod, name, number) and _out(policies, source, target, name, number)
    }


def open_egress(objects: Sequence[Object]) -> set[tuple[str, str]]:
    """``(pod, to)`` of every way out of the namespace; ``to`` is an address block, a namespace, or ``anywhere``."""
    found = set()
    for pod in pods(objects):
        chosen, rules = _rules(of_kind(objects, "NetworkPolicy"), pod, "Egress")
        if not chosen:
            found.add((pod.name, "anywhere"))
        found |= {(pod.name, to) for rule in rules for to in _outside(rule)}
    return found


def _outside(rule: Object) -> set[str]:
    if not rule.get("to"):
        return {"anywhere"}
    found = set()
    for peer in rule["to"]:
        if "ipBlock" in peer:
            found.add(peer["ipBlock"]["cidr"])
        elif "namespaceSelector" in peer:
            found.add(peer["namespaceSelector"].get("matchLabels", {}).get("kubernetes.io/metadata.name", "any namespace"))
    return found


def _in(policies: Sequence[Object], source: Peer, target: Pod, name: str, number: int) -> bool:
    chosen, rules = _rules(policies, target, "Ingress")
    return not chosen or any(_peer(rule.get("from"), source) and _port(rule, name, number) for rule in rules)


def _out(policies: Sequence[Object], source: Peer, target: Peer, name: str, number: int) -> bool:
    if source.pod is None:
        return True
    chosen, rules = _rules(policies, source.pod, "Egress")
    return not chosen or any(_peer(rule.get("to"), target) and _port(rule, name, number) for rule in rules)


def _rules(policies: Sequence[Object], pod: Pod, direction: str) -> tuple[bool, list[Object]]:
    """Whether any policy governs this direction of a pod, and what they allow together."""
    specs = [policy["spec"] for policy in policies]
    chosen = [spec for spec in specs if direction in spec["policyTypes"] and matches(spec["podSelector"], pod.labels)]
    return bool(chosen), [rule for spec in chosen for rule in spec.get(direction.lower(), [])]


def _peer(peers: Sequence[Object] | None, end: Peer) -> bool:
    """No list means everybody. A peer in another namespace is somebody in particular: neither one of ours nor just anyone outside."""
    if not peers:
        return True
    ours = [peer for peer in peers if "namespaceSelector" not in peer]
    return end.pod is not None and any(matches(peer.get("podSelector"), end.pod.labels) for peer in ours)


def _port(rule: Object, name: str, number: int) -> bool:
    return not rule.get("ports") or any(port.get("port") in (name, number) for port in rule["ports"])
