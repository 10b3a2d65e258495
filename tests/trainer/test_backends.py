"""Which backend is taken where; nothing is imported that can not run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parampara.errors import InvalidRequest
from trainer.backends import choose


@pytest.fixture
def gpu_without_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is a part of the machine, which no test can bring; torch says here that there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


@pytest.mark.usefixtures("gpu_without_compiler")
def test_on_a_gpu_without_a_c_compiler_auto_takes_trl_and_says_why(tmp_path: Path) -> None:
    choice = choose("auto", cache=tmp_path / "unsloth")
    assert choice.name == "trl"
    assert "no C compiler, which Triton needs" in choice.reason
    with pytest.raises(InvalidRequest, match="no C compiler"):
        choose("unsloth", cache=tmp_path / "unsloth")


@pytest.mark.usefixtures("gpu_without_compiler")
def test_a_compiler_that_is_named_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import backends

    assert not backends._has_c_compiler()
    compiler = tmp_path / "my-cc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert backends._has_c_compiler()
