"""Upload data sets and start a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parampara.errors import InvalidRequest
from standalone.client import Platform


def upload_all(platform: Platform, data: Mapping[str, Sequence[Path]]) -> dict[str, list[str]]:
    """Data set name to the ids of its uploaded files."""
    return {name: [platform.upload(path, purpose="fine-tune")["id"] for path in paths] for name, paths in data.items()}


def create_run(
    platform: Platform, recipe: Path, datasets: dict[str, list[str]], *, reuse: bool, metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    """``POST /v1/runs`` with the recipe file's text as it stands.

    Raises:
        InvalidRequest: the recipe cannot be read, or is refused; the message names the path of the key at fault.
    """
    try:
        text = recipe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"Cannot read the recipe {recipe}: {error}", param="recipe") from None
    return platform.post("/runs", {"recipe_yaml": text, "datasets": datasets, "reuse": reuse, "metadata": metadata or {}})


def submit_run(platform: Platform, recipe: Path, data: Mapping[str, Sequence[Path]], *, reuse: bool) -> dict[str, Any]:
    """Upload, then create."""
    return create_run(platform, recipe, upload_all(platform, data), reuse=reuse)
