"""Work directories and the store may lie on different volumes: publishing then copies instead of renaming."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from parampara.execution.products import disk_error
from parampara.storage import LocalStorage

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A directory on another device than ``tmp_path``."""
    if not os.access(SHARED_MEMORY, os.W_OK) or SHARED_MEMORY.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    folder = Path(tempfile.mkdtemp(dir=SHARED_MEMORY))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_product_on_another_device_is_published_whole(tmp_path: Path, elsewhere: Path) -> None:
    output = elsewhere / "output"
    output.mkdir()
    (output / "weights.bin").write_bytes(b"\x01\x02")
    store = LocalStorage(tmp_path / "artifacts")
    manifest = store.publish(output, kind="report", move=True)
    assert (store.verify(manifest.id) / "weights.bin").read_bytes() == b"\x01\x02"
    assert list((tmp_path / "artifacts" / "staging").iterdir()) == []


def test_a_product_on_the_same_device_is_moved(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "weights.bin").write_bytes(b"\x01\x02")
    inode = (output / "weights.bin").stat().st_ino
    store = LocalStorage(tmp_path / "artifacts")
    manifest = store.publish(output, kind="report", move=True)
    assert (store.path(manifest.id) / "weights.bin").stat().st_ino == inode
    assert not output.exists()


def test_a_disk_that_is_full_while_copying_is_told_as_such(tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = elsewhere / "output"
    output.mkdir()
    (output / "weights.bin").write_bytes(b"\x01\x02")

    def full(_: str, target: str) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    monkeypatch.setattr(shutil, "copy2", full)
    store = LocalStorage(tmp_path / "artifacts")
    with pytest.raises(OSError, match="No space left") as caught:
        store.publish(output, kind="report", move=True)
    assert caught.value.errno == errno.ENOSPC
    assert disk_error(caught.value, "what")["code"] == "disk_full"
    assert list((tmp_path / "artifacts" / "staging").iterdir()) == []
    assert (output / "weights.bin").exists()
