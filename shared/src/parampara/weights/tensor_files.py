"""Reading and writing safetensors by row ranges, so that memory does not grow with the model.

The format (https://huggingface.co/docs/safetensors): 8 bytes of little-endian header length, a JSON header that maps each
name to dtype, shape and byte range, then the bytes. Plain reads instead of a memory map: mapped pages would count as
resident memory of this process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from parampara.errors import InvalidData

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
_SEND_BYTES = 64 * 1024 * 1024
"""Written bytes after which the system is asked to bring them to the disk."""
_WRITES_AHEAD = 8
"""Calls of :meth:`ShardWriter.write` whose rows may wait for the disk, in memory."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file; ``start`` is the offset of its first byte in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


class TensorFile:
    """An open safetensors file; its header is checked as a whole before anything is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        try:
            self.tensors = self._header()
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        return self.read_rows(name, 0, info.rows).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int, *, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` along the first dimension, shape ``[stop - start, row_elements]``, dtype of the file.

        ``into``: a flat tensor of that dtype with room for the rows, whose memory is used instead of new memory.

        Raises:
            InvalidData: the file is shorter than its header says.
        """
        info = self.tensors[name]
        count = (stop - start) * info.row_elements
        flat = torch.empty(count, dtype=info.dtype) if into is None else into[:count]
        view = _bytes(flat)
        offset = info.start + start * info.row_elements * info.dtype.itemsize
        while view:
            read = os.preadv(self._file.fileno(), [view], offset)
            if read == 0:
                raise InvalidData(f"{self.path.name}: ends inside tensor {name}; the file is truncated.", param=self.path.name)
            view, offset = view[read:], offset + read
        return flat.view(stop - start, info.row_elements)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _header(self) -> dict[str, TensorInfo]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise InvalidData(f"{self.path.name}: not a safetensors file (bad header length).", param=self.path.name)
        try:
            header = json.loads(self._file.read(length))
            tensors = [_info(name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidData(f"{self.path.name}: its safetensors header can not be read ({error}).", param=self.path.name) from None
        position = 8 + length
        for info in sorted(tensors, key=lambda info: (info.start, info.bytes)):
            if info.start != position:
                raise InvalidData(f"{self.path.name}: tensor {info.name} overlaps another or leaves a gap.", param=self.path.name)
            position += info.bytes
        if position != size:
            raise InvalidData(f"{self.path.name}: {size} bytes where the header describes {position}; truncated?", param=self.path.name)
        return {info.name: info for info in sorted(tensors, key=lambda info: info.start)}


def _bytes(flat: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(flat.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _info(name: str, entry: dict, base: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {entry['dtype']}, which this reader does not know")
    shape = tuple(int(size) for size in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    info = TensorInfo(name=name, dtype=DTYPES[entry["dtype"]], shape=shape, start=base + begin)
    if min(shape, default=0) < 0 or end - begin != info.bytes:
        raise ValueError(f"tensor {name}: its byte range does not fit its shape")
    return info


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Writes one safetensors file front to back: the header first, then rows of each tensor in the order planned.

    ``hashed`` takes the file's sha256 on the way, which saves reading it again. ``behind`` does both in a thread of its own while the
    caller makes the next rows: each call's memory is the writer's from then on, and what fails is raised by a later call or by leaving
    the context.
    """

    def __init__(self, path: Path, tensors: Iterable[Planned], *, hashed: bool = False, behind: bool = False) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.bytes],
            }
            offset += tensor.bytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._size = 8 + len(encoded) + offset
        self._path = path
        self._digest = hashlib.sha256() if hashed else None
        self._file = path.open("wb", buffering=0)
        self._unsent = 0
        self._behind = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-writer") if behind else None
        self._waiting: deque[Future[None]] = deque()
        self._put(memoryview(len(encoded).to_bytes(8, "little") + encoded))

    @property
    def sha256(self) -> str:
        """Of the file, once its context was left. Only where ``hashed`` was asked for."""
        if self._digest is None:
            raise RuntimeError(f"{self._path.name} was written without being hashed.")
        return self._digest.hexdigest()

    def write(self, rows: torch.Tensor) -> None:
        """Append ``rows`` to the tensor in turn.

        Raises:
            OSError: these or earlier rows could not be written.
        """
        if self._behind is None:
            self._put(_bytes(rows.contiguous()))
            return
        while len(self._waiting) >= _WRITES_AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._behind.submit(self._put, _bytes(rows.contiguous())))

    def _put(self, data: memoryview) -> None:
        if self._digest is not None:
            self._digest.update(data)
        while data:  # one write takes at most 2 GiB
            count = self._file.write(data)
            self._unsent += count
            data = data[count:]
        if self._unsent >= _SEND_BYTES:
            # Linux begins to write such a range to the disk and goes on: less is left to wait for when the file is synced
            with suppress(OSError):  # of a file system that takes no advice
                os.posix_fadvise(self._file.fileno(), self._file.tell() - self._unsent, self._unsent, os.POSIX_FADV_DONTNEED)
            self._unsent = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            while kind is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            if self._behind is not None:
                self._behind.shutdown(cancel_futures=True)
            self._file.close()
        if kind is None and self._path.stat().st_size != self._size:
            raise RuntimeError(f"{self._path.name}: {self._path.stat().st_size} bytes were written, {self._size} were planned.")
