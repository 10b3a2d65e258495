"""What is wrong with settings and files is told in one line, without a traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from parampara.settings import Settings
from standalone import failures


def up(home: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PARAMPARA_HOME": str(home), **settings}
    return subprocess.run(
        [sys.executable, "-m", "standalone", "up"], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PARAMPARA_GATEWAY__PORT", "99999", "PARAMPARA_GATEWAY__PORT is '99999': Input should be less than or equal to 65535"),
        ("PARAMPARA_ORGANIZATION", "No Spaces", "PARAMPARA_ORGANIZATION is 'No Spaces'"),
        ("PARAMPARA_BASE_MODELS", "{x", "PARAMPARA_BASE_MODELS is not valid JSON"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_limit(tmp_path: Path, name: str, value: str, words: str) -> None:
    done = up(tmp_path / "home", **{name: value})
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert words in done.stderr
    assert not (tmp_path / "home" / "postgres").exists()


def test_a_home_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = up(tmp_path / "file" / "home")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert f"Not a directory: {tmp_path / 'file' / 'home'}" in done.stderr


def test_what_may_not_be_read_is_told_with_the_way_out() -> None:
    told = failures.of_files(PermissionError(errno.EACCES, "Permission denied", "/srv/home/stack.lock"))
    assert told.startswith("Permission denied: /srv/home/stack.lock (it belongs to another account")
    assert "PARAMPARA_HOME" in told
    assert failures.of_files(OSError("odd")) == "odd"


def test_no_secret_is_repeated_and_other_models_faults_are_not_taken_for_settings() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"database": {"url": 7, "pool_size": 0}, "key_pepper": 5})
    told = failures.of_settings(caught.value) or ""
    assert "PARAMPARA_DATABASE__POOL_SIZE is 0: " in told
    assert "PARAMPARA_DATABASE__URL: " in told
    assert "PARAMPARA_KEY_PEPPER: " in told
    with pytest.raises(ValidationError) as other:
        Settings.model_fields["gateway"].annotation.model_validate({"port": 0})  # type: ignore[union-attr]
    assert failures.of_settings(other.value) is None
