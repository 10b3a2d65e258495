"""Finding base models and telling them apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from parampara import base_models
from parampara.errors import InvalidRequest
from parampara.settings import Settings


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    return model


def test_a_configured_name(directory: Path) -> None:
    assert base_models.resolve(Settings(base_models={"tiny": str(directory)}), "tiny") == directory


def test_a_hub_id_in_the_cache_is_found_by_its_main_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--meta--Llama"
    for revision in ("aaa", "bbb"):
        (repository / "snapshots" / revision).mkdir(parents=True)
        (repository / "snapshots" / revision / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("aaa\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert base_models.resolve(Settings(), "meta/Llama").name == "aaa"


@pytest.mark.parametrize("name", ["unknown", "no/such", "../../etc", "a/../b", ""])
def test_unknown_names_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(InvalidRequest) as caught:
        base_models.resolve(Settings(base_models={"tiny": "/x"}), name)
    assert (caught.value.param, caught.value.code) == ("recipe.base_model", "model_not_found")
    assert "Known: tiny" in caught.value.message


def test_the_fingerprint_sees_weights_configuration_and_tokenizer(directory: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = base_models.fingerprint(directory, cache=cache)
    assert base_models.fingerprint(directory, cache=cache) == base_models.fingerprint(directory) == first
    (directory / "tokenizer.json").write_text("{}")
    second = base_models.fingerprint(directory, cache=cache)
    (directory / "model.safetensors").write_bytes(b"weightz")
    third = base_models.fingerprint(directory, cache=cache)
    assert len({first, second, third}) == 3


def test_short_names() -> None:
    assert base_models.short_name("meta-llama/Llama-3.1-8B-Instruct") == "llama-3.1-8b-instruct"
