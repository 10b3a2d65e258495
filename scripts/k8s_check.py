#!/usr/bin/env python3
"""Renders every overlay and example under k8s/ and checks the result, offline: strict schemas, house rules, references.

``make k8s-check`` runs this, then the tests that compare the manifests with the code. Your own overlays: name their folders as arguments.
Exit code 0: no fault, 1: faults, 2: nothing to render with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from k8s_checks import policy, references, rendering, schemas
from k8s_checks.objects import Object

CHECKS: dict[str, Callable[[Sequence[Object]], list[str]]] = {"policy": policy.faults, "references": references.faults}


def check(objects: Sequence[Object]) -> list[str]:
    """Everything that is wrong with them; the rules are only asked about objects that fit their schemas."""
    if unfit := schemas.faults(objects):
        return [f"schemas: {fault}" for fault in unfit]
    return [f"{name}: {fault}" for name, find in CHECKS.items() for fault in find(objects)]


def main(arguments: Sequence[str]) -> int:
    command = rendering.tool()
    if command is None:
        print(rendering.HOW_TO_INSTALL, file=sys.stderr)
        return 2
    print(f"rendering with `{' '.join(command)}`; schemas of Kubernetes {', '.join(schemas.VERSIONS)}")
    count = 0
    for target in [Path(argument) for argument in arguments] or rendering.targets():
        name = target.relative_to(rendering.ROOT) if target.is_relative_to(rendering.ROOT) else target
        try:
            objects = rendering.render(target)
        except rendering.RenderFailed as error:
            faults = [str(error)]
        else:
            faults = check(objects)
            print(f"{name}: {len(objects)} objects, {len(faults)} faults")
        for fault in faults:
            print(f"  {name}: {fault}", file=sys.stderr)
        count += len(faults)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
