"""The catalogue of base models: from the name in a recipe to a local directory.

A name is either a key of ``PARAMPARA_BASE_MODELS`` or a hub id (``org/name``) that is already in the local Hugging Face
cache. Nothing is ever downloaded here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from parampara.errors import InvalidRequest
from parampara.manifest import sha256_file, weights_fingerprint
from parampara.settings import Settings
from parampara.storage import write_atomically

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")


def resolve(settings: Settings, name: str, *, param: str = "recipe.base_model") -> Path:
    """Directory with the weights, configuration and tokenizer of a base model.

    Raises:
        InvalidRequest: the name is neither in the catalogue nor in the cache, or its directory is not a model.
    """
    directory = _configured(settings, name) or _cached(name)
    if directory is None:
        known = ", ".join(sorted(settings.base_models)) or "none"
        raise InvalidRequest(
            f"Unknown base model {name!r}. Known: {known}. Add it to PARAMPARA_BASE_MODELS, or put the hub model into the local "
            "Hugging Face cache first (nothing is downloaded during a run).",
            param=param,
            code="model_not_found",
        )
    if not (directory / "config.json").is_file():
        raise InvalidRequest(f"Base model {name!r}: {directory} holds no config.json.", param=param, code="model_not_found")
    return directory


def short_name(name: str) -> str:
    """The part of a base model's name that goes into the names of models made from it: ``llama-3.1-8b-instruct``."""
    return _NOT_IN_NAMES.sub("-", name.rsplit("/", 1)[-1].lower()).strip("-.")


def fingerprint(directory: Path, *, cache: Path | None = None) -> str:
    """sha256 over weights, configuration and tokenizer files of a model directory.

    Hashing a 16 GB model takes a minute: with ``cache`` (a directory) the result is kept under names, sizes and times.
    """
    files = sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"))
    stats = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([str(directory.resolve()), stats]).encode()).hexdigest()
    if cache is not None and (cache / key).is_file():
        return (cache / key).read_text()
    digest = hashlib.sha256(weights_fingerprint(directory).encode())
    for path in files:
        if path.suffix != ".safetensors":
            digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(cache / key, digest.hexdigest().encode())
    return digest.hexdigest()


def _configured(settings: Settings, name: str) -> Path | None:
    directory = settings.base_models.get(name)
    return None if directory is None else Path(directory).resolve()


def _cached(name: str) -> Path | None:
    """Newest snapshot of a hub id in the local cache (``hub/models--org--name/snapshots/<revision>``)."""
    if not _HUB_ID.fullmatch(name):
        return None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    repository = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / "main"
    if reference.is_file() and (snapshot := repository / "snapshots" / reference.read_text().strip()).is_dir():
        return snapshot
    snapshots = [path for path in (repository / "snapshots").glob("*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime) if snapshots else None
