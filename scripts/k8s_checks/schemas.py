"""Strict schemas, offline: Kubernetes' own from the package kubernetes-validate, ours for the custom resources that we use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from k8s_checks.objects import Object, label

VERSIONS = ("1.27", "1.32", "1.37")
"""The oldest Kubernetes that the manifests are for, one in between, and the newest with a schema."""


def faults(objects: Sequence[Object]) -> list[str]:
    """Every object must fit its schema, unknown fields refused; an object without a schema is a fault."""
    return [fault for item in objects for fault in _faults(json.dumps(item))]


@lru_cache
def custom_schemas() -> dict[str, dict[str, Any]]:
    """``group/version/Kind`` to its schema."""
    return yaml.safe_load(Path(__file__).with_name("custom_resources.yaml").read_text(encoding="utf-8"))["schemas"]


@lru_cache(maxsize=1024)
def _faults(text: str) -> tuple[str, ...]:
    """The overlays have most objects in common: each is looked at once."""
    return tuple(_of(json.loads(text)))


def _of(item: Object) -> Iterator[str]:
    custom = custom_schemas().get(f"{item['apiVersion']}/{item['kind']}")
    if custom is not None:
        for error in jsonschema.Draft202012Validator(custom).iter_errors(item):
            yield f"{label(item)}: {_where(error)}: {error.message}"
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{label(item)} (Kubernetes {version}): {_where(error)}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{label(item)}: Kubernetes {version} has no {item['apiVersion']} {item['kind']}"


def _where(error: jsonschema.ValidationError) -> str:
    return ".".join(str(part) for part in error.absolute_path) or "the object"
