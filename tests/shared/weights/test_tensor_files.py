"""The safetensors reader and writer against the safetensors library, and headers that lie."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from parampara.errors import InvalidData
from parampara.manifest import sha256_file
from parampara.weights.tensor_files import Planned, ShardWriter, TensorFile

TENSORS = {
    "matrix": torch.arange(35, dtype=torch.float32).reshape(7, 5),
    "half": torch.randn(3, 2, 4).to(torch.bfloat16),
    "counts": torch.tensor([1, 2, 3]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, str(tmp_path / "a.safetensors"))
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert set(file.tensors) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(file.read(name), tensor)
        assert torch.equal(file.read_rows("matrix", 2, 5), TENSORS["matrix"][2:5])


def test_the_library_reads_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    with ShardWriter(path, [Planned(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()], hashed=True) as writer:
        for name, tensor in TENSORS.items():
            for rows in tensor.split(2) if name == "matrix" else [tensor]:
                writer.write(rows)
    assert writer.sha256 == sha256_file(path)
    loaded = load_file(str(path))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_shard_with_missing_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="were planned"), ShardWriter(tmp_path / "c", [Planned("x", torch.float32, (4, 4))]) as writer:
        writer.write(torch.zeros(3, 4))


def test_written_behind_the_bytes_and_their_hash_are_the_same(tmp_path: Path) -> None:
    rows = torch.arange(4000.0).reshape(1000, 4)
    for name, behind in (("now", False), ("behind", True)):
        with ShardWriter(tmp_path / name, [Planned("x", torch.float32, (1000, 4))], hashed=True, behind=behind) as writer:
            for chunk in rows.split(7):
                writer.write(chunk.clone())
        assert writer.sha256 == sha256_file(tmp_path / name)
    assert (tmp_path / "now").read_bytes() == (tmp_path / "behind").read_bytes()


@pytest.mark.parametrize("chunks", [1, 64])
def test_what_fails_behind_is_raised(tmp_path: Path, chunks: int) -> None:
    """With one chunk on leaving, with many by a later call: no shard that was not written whole is taken for one."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # Python ignores the signal, so that a write fails as on a full disk
    try:
        rows = torch.zeros(chunks * 1000, 4)
        planned = [Planned("x", torch.float32, (chunks * 1000, 4))]
        with pytest.raises(OSError, match="File too large"), ShardWriter(tmp_path / "x", planned, behind=True) as writer:
            list(map(writer.write, rows.split(1000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def lying(path: Path, header: object, body: int) -> Path:
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"\0" * body)
    return path


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, 12),
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, 20),
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, 12),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12),
        ({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, 2),
        ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, 0),
        ({"x": {"dtype": "F32"}}, 0),
        ({"x": 3}, 0),
        ([1], 0),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: object, body: int) -> None:
    with pytest.raises(InvalidData):
        TensorFile(lying(tmp_path / "x.safetensors", header, body))


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0\x80\x81"])
def test_files_that_are_not_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidData):
        TensorFile(path)
