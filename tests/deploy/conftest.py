"""What the deployment tests compare: the compose files, the Dockerfiles, the Kubernetes manifests and the settings, each read once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, SecretStr

from k8s_checks import rendering
from k8s_checks.objects import Object
from parampara.settings import Settings
from tests.deploy.deployment_files import ROOT


@dataclass(frozen=True)
class Variable:
    """One setting as the environment sees it."""

    name: str
    default: Any
    is_mapping: bool


@pytest.fixture(scope="session")
def variables() -> dict[str, Variable]:
    """Every environment variable that :class:`parampara.settings.Settings` reads."""
    return {variable.name: variable for variable in _flatten(Settings, "PARAMPARA_", {})}


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def gpu() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.gpu.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def manifests() -> dict[str, list[Object]]:
    """What kustomize makes of every overlay and example, by name: ``cpu``, ``single-gpu``..."""
    if rendering.tool() is None:
        pytest.skip("neither kustomize nor kubectl is on PATH: no manifest can be rendered")
    return {target.name: rendering.render(target) for target in rendering.targets()}


def _flatten(model: type[BaseModel], prefix: str, given: dict[str, Any]) -> Iterator[Variable]:
    for name, field in model.model_fields.items():
        variable = f"{prefix}{name}".upper()
        default = given.get(name, field.get_default(call_default_factory=True))
        kind = field.annotation
        if isinstance(kind, type) and not isinstance(kind, UnionType) and get_origin(kind) is None and issubclass(kind, BaseModel):
            yield from _flatten(kind, f"{variable}__", default.model_dump() if isinstance(default, BaseModel) else {})
        else:
            secret = default.get_secret_value() if isinstance(default, SecretStr) else default
            yield Variable(variable, secret, get_origin(kind) is dict or any(get_origin(part) is dict for part in get_args(kind)))
