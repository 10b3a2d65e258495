"""One stage on several GPUs of a machine: who takes part, what they agree on, and how their ends become one.

The stage process is rank 0. It starts the other ranks (:mod:`trainer.follower`) as children in its own session, so that one signal
to the session kills all, and the kernel kills them with it. They meet through a file in the working directory. Rank 0 alone
hears signals, reports and writes; a rank that dies ends the stage with the error that it had.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from parampara import errors
from parampara.errors import EXIT_OK, EXIT_PREEMPTED, InvalidRequest, ParamparaError, ProcessDied
from parampara.execution import stop
from parampara.execution.child import SUPERVISOR_PID, disk_full
from parampara.progress import Progress
from parampara.schemas.stages import DaptConfig, DpoConfig, SftConfig, TrainResult
from parampara.storage import write_atomically

T = TypeVar("T")
Config = DaptConfig | SftConfig | DpoConfig

_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others; the longest that one works alone is while it writes a checkpoint."""
_POLL_SECONDS = 0.1
_LAST_WORDS_SECONDS = 1.0
"""From the end of a rank until the stage decides which error it was: one that lost its partner may end before that one is seen."""
_GRACE_SECONDS = 20.0
"""From there until this process ends by force, where the main thread waits in a kernel that never ends."""


@dataclass(frozen=True)
class Group:
    """The ranks of a stage. Each method that is not of one rank alone must be called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    store: Any = None
    check: Callable[[], None] = lambda: None
    """Raises what has become of another rank; of rank 0."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """A block that rank 0 runs before the others, who find what it wrote; afterwards they can talk to each other."""
        if self.size == 1:
            yield
            return
        if not self.first:
            self._wait_for("prepared")
        yield
        self.store.set(f"ready {self.rank}", "")
        if self.first:
            self.store.set("prepared", "")
            for rank in range(self.size):
                self._wait_for(f"ready {rank}")
        self._connect()

    def scratch(self, workdir: Path) -> Path:
        """Where a rank other than 0 writes what nobody reads."""
        folder = workdir / "ranks" / str(self.rank)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def seed(self, seed: int) -> None:
        """Let the generators of each rank draw other numbers, for dropout; those of rank 0 are as ``transformers.set_seed`` left them."""
        if not self.first:
            from transformers import set_seed

            set_seed(seed + self.rank)

    def stopped(self) -> bool:
        """Whether a stop was asked for; one answer for all ranks, so that they stop at the same micro-batch."""
        return stop.requested() if self.size == 1 else bool(self.sums(float(stop.requested()))[0])

    def sums(self, *values: float) -> list[float]:
        """Each value added up over the ranks, in double precision and equal on all of them."""
        if self.size == 1:
            return list(values)
        import torch

        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in order, on rank 0; an empty list on the others."""
        if self.size == 1:
            return [value]
        import torch

        found: list[Any] | None = [None] * self.size if self.first else None
        torch.distributed.gather_object(value, found)
        return found or []

    def require_equal(self, value: Any, what: str) -> None:
        """Ranks that see different data would train on nonsense, or wait for each other for ever.

        Raises:
            ProcessDied: ``value`` (JSON) differs.
        """
        if self.size == 1:
            return
        import torch

        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, json.dumps(value, sort_keys=True))
        if len(set(found)) > 1:
            raise ProcessDied(f"The {self.size} processes of the stage do not have the same {what}; nothing was trained.")

    def deal(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """``items`` in turns: those of this rank, as many on each rank. The flag is False where there is none left for it, and the item is
        another's, for a pass that counts for nothing."""
        rest = iter(items)
        while hand := list(islice(rest, self.size)):
            yield hand[min(self.rank, len(hand) - 1)], self.rank < len(hand)

    def _wait_for(self, key: str) -> None:
        while not self.store.check([key]):  # in Python: a signal gets through, and a dead rank is noticed
            self.check()
            time.sleep(_POLL_SECONDS)

    def _connect(self) -> None:
        import torch

        gpu = torch.cuda.is_available()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if gpu:
            torch.cuda.set_device(0)  # the only one that this rank sees
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // self.size))
        # to the libraries each process is alone; what they advise then would mislead
        logging.getLogger("transformers.training_args").addFilter(lambda record: "process group" not in record.getMessage())
        torch.distributed.init_process_group(
            # what is agreed on lies in ordinary memory, and no GPU is waited for
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=torch.distributed.PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.size,
            timeout=_TIMEOUT,
        )


ALONE = Group()


def processes(config: Config) -> tuple[int, str | None]:
    """How many processes train, and where that is fewer than the worker is set to, why.

    Raises:
        InvalidRequest: ``config.machine.processes`` is more than there are GPUs.
    """
    import torch

    if (asked := config.machine.processes) == 1:  # and no GPU is counted, which may touch it: a fork could not use it any more
        return 1, None
    gpus = torch.cuda.device_count()
    if (fault := _bound_to_one(config)) is not None:
        return 1, f"one process trains, and not {asked}: {fault}"
    if gpus and asked > gpus:
        raise InvalidRequest(
            f"The stage is to train in {asked} processes, a GPU each, and {gpus} are visible; set PARAMPARA_WORKER__PROCESSES={gpus}.",
            param="machine.processes",
        )
    return asked, None


def _bound_to_one(config: Config) -> str | None:
    """Why only one process can train this."""
    if config.kind == "dpo":
        return "stage dpo knows no other way"
    if config.params.lora is None:
        return "lora is null, and whole weights are not sharded"
    if config.backend == "unsloth":
        return "backend is unsloth, which trains on one GPU"
    if config.params.train.load_in_4bit:
        return "load_in_4bit is true, and packed weights are not sharded"
    return None


def run(config: Config, train: Callable[..., TrainResult], *, workdir: Path, progress: Progress) -> TrainResult:
    """``train`` in as many processes as the configuration and the machine ask for; this one is rank 0.

    Raises:
        InvalidRequest: see :func:`processes`.
        ProcessDied: another process was killed or crashed.
        Whatever ``train`` raises, in this process or in another one.
    """
    size, reason = processes(config)
    if reason is not None:
        progress.event(reason, level="warn")
    if size == 1:
        return train(config, workdir=workdir, progress=progress, group=ALONE)
    with _started(config, workdir=workdir, size=size) as group:
        progress.event(f"{size} processes train together", processes=size)
        return train(config, workdir=workdir, progress=progress, group=group)


def join(folder: Path, *, rank: int, size: int) -> Group:
    """The group as another rank than 0 sees it."""
    return Group(rank, size, _store(folder, size))


def tell(folder: Path, rank: int, error: ParamparaError) -> None:
    """Leave ``error`` for rank 0; call right before the end of the process."""
    told = {"class": type(error).__name__, "message": error.message, "param": error.param, "code": error.code}
    write_atomically(folder / f"error-{rank}.json", json.dumps(told).encode())


def _store(folder: Path, size: int) -> Any:
    import torch

    return torch.distributed.FileStore(str(folder / "store"), size)


@contextmanager
def _started(config: Config, *, workdir: Path, size: int) -> Iterator[Group]:
    folder = workdir / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    devices = _devices(size)
    watch = _Watch([_start(rank, size=size, workdir=workdir, device=devices[rank]) for rank in range(1, size)], workdir=workdir)
    if devices[0] is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[0]
    watch.start()
    try:
        yield Group(0, size, _store(folder, size), watch.check)
    except Exception as error:
        if (cause := watch.cause_of(error)) is not None:
            raise cause from error
        raise
    finally:
        watch.end()
        shutil.rmtree(folder, ignore_errors=True)


def _devices(size: int) -> list[str | None]:
    """What each rank gets as ``CUDA_VISIBLE_DEVICES``: one GPU, so that "the GPU" means its own everywhere; None on a CPU."""
    import torch

    if not torch.cuda.device_count():
        return [None] * size
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return list(named[:size] if named else map(str, range(size)))


class _Spawned:
    """Another rank as a process of its own, in this session."""

    def __init__(self, rank: int, *, size: int, workdir: Path, variables: dict[str, str]) -> None:
        command = [sys.executable, "-m", "trainer.follower", "--workdir", str(workdir), "--rank", str(rank), "--size", str(size)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, **variables})

    def poll(self) -> int | None:
        return self._process.poll()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class _Forked:
    """Another rank forked from this process, which has the libraries imported and has done nothing with them yet; not on a GPU, which
    counting may have touched."""

    def __init__(self, rank: int, *, size: int, workdir: Path, variables: dict[str, str]) -> None:
        from trainer.follower import follow

        def become() -> None:
            os.environ.update(variables)
            follow(workdir, rank=rank, size=size)

        self._process = get_context("fork").Process(target=become, daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _start(rank: int, *, size: int, workdir: Path, device: str | None) -> _Spawned | _Forked:
    """Its death is tied to that of this thread by the kernel."""
    variables = {SUPERVISOR_PID: str(os.getpid()), **({} if device is None else {"CUDA_VISIBLE_DEVICES": device})}
    return (_Forked if device is None and _may_fork() else _Spawned)(rank, size=size, workdir=workdir, variables=variables)


def _may_fork() -> bool:
    """In a stage that was forked itself (:mod:`parampara.execution.preloaded`): the imports are done, and no thread lives."""
    return "trl" in sys.modules and len(os.listdir("/proc/self/task")) == 1


class _Watch(threading.Thread):
    """Notices the end of the other ranks, whatever the main thread of rank 0 does meanwhile."""

    def __init__(self, followers: list[_Spawned | _Forked], *, workdir: Path) -> None:
        super().__init__(daemon=True, name="ranks")
        self._followers, self._workdir = followers, workdir
        self._over = threading.Event()
        self._failed = threading.Event()
        self._failure: ParamparaError | None = None

    def run(self) -> None:
        while not any(self._codes()):
            if self._over.wait(_POLL_SECONDS):
                return
        time.sleep(_LAST_WORDS_SECONDS)
        self._failure = self._error()
        self._failed.set()
        if not self._over.wait(_GRACE_SECONDS):
            with contextlib.suppress(OSError):  # disk full: the exit code still tells
                write_atomically(self._workdir / "error.json", json.dumps(self._failure.body()).encode())
            print(f"{type(self._failure).__name__}: {self._failure.message}", file=sys.stderr, flush=True)
            os._exit(self._failure.exit_code)

    def check(self) -> None:
        """Raise what has become of another rank, if it has failed."""
        if self._failure is not None:
            raise self._failure

    def cause_of(self, error: Exception) -> ParamparaError | None:
        """The failure of another rank that ``error`` of this one comes from; None where ``error`` says itself what it is."""
        if isinstance(error, ParamparaError) or disk_full(error) is not None:
            return None
        if self._failed.wait(3 * _LAST_WORDS_SECONDS):  # of any class: a library may catch that a layer did not come together, and go on
            return self._failure
        import torch

        if isinstance(error, torch.distributed.DistError) or any(name in str(error) for name in ("gloo", "NCCL")):
            return ProcessDied(f"The processes of the stage have lost each other: {str(error).splitlines()[0][:200]}")
        return None

    def end(self) -> None:
        """End the thread and the other ranks, which have nothing to do any more."""
        self._over.set()
        for process in self._followers:
            process.end()
        self.join()

    def _codes(self) -> list[int]:
        """Exit codes of the ranks that ended otherwise than all of them do together."""
        return [code for process in self._followers if (code := process.poll()) not in (None, EXIT_OK, EXIT_PREEMPTED)]

    def _error(self) -> ParamparaError:
        """The one that tells most: an error with a name, then a signal, then whatever it was."""
        found = [
            (_told(self._workdir / "ranks" / f"error-{rank}.json"), rank, code)
            for rank, process in enumerate(self._followers, 1)
            if (code := process.poll()) not in (None, EXIT_OK, EXIT_PREEMPTED)
        ]
        named = [error for error, _, _ in found if error is not None]
        if named:
            return min(named, key=lambda error: isinstance(error, ProcessDied))
        _, rank, code = min(found, key=lambda ended: ended[2] or 0)
        what = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        hint = " (often: the machine ran out of memory)" if code == -signal.SIGKILL else ""
        count = len(self._followers) + 1
        return ProcessDied(
            f"Process {rank + 1} of the {count} that train together {what}{hint}; retried, the stage goes on from its checkpoint."
        )


def _told(path: Path) -> ParamparaError | None:
    try:
        told = json.loads(path.read_bytes())
        kind: type[ParamparaError] = getattr(errors, told["class"])
        return kind(told["message"], param=told["param"], code=told["code"])
    except (OSError, ValueError, KeyError, AttributeError):
        return None
