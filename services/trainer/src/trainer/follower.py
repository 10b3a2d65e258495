"""Another rank of a training stage: ``python -m trainer.follower --workdir DIR --rank 1 --size 2``, started by :mod:`trainer.ranks`.

It runs the same stage function as rank 0 and says nothing but how it failed. Signals are for rank 0, which tells the others.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from parampara.errors import EXIT_OK, OutOfMemory, ParamparaError, ProcessDied
from parampara.execution.child import die_with_supervisor, disk_full, read_config
from parampara.progress import SilentProgress
from parampara.schemas.stages import DaptConfig, SftConfig

_CONFIGS = {"dapt": DaptConfig, "sft": SftConfig}


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="python -m trainer.follower")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    arguments = parser.parse_args()
    follow(arguments.workdir, rank=arguments.rank, size=arguments.size)


def follow(workdir: Path, *, rank: int, size: int) -> NoReturn:
    """Take part, and end this process with the exit code of what it came to."""
    die_with_supervisor()
    faulthandler.enable()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    code = 1
    try:
        code = _take_part(workdir, rank=rank, size=size)
    finally:
        _end(code)


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # disk full: the exit code still tells
            stream.flush()
    os._exit(code)  # at once: the others see the end of this process by its connections


def _take_part(workdir: Path, *, rank: int, size: int) -> int:
    from trainer import ranks

    folder = workdir / "ranks"
    try:
        kind = json.loads((folder / "config.json").read_bytes())["kind"]
        config = read_config(_CONFIGS[kind], folder / "config.json")
        group = ranks.join(folder, rank=rank, size=size)
        if kind == "dapt":
            from trainer.dapt import train
        else:
            from trainer.sft import train
        train(config, workdir=workdir, progress=SilentProgress(), group=group)  # type: ignore[arg-type]
        return EXIT_OK
    except ParamparaError as caught:
        error = caught
    except MemoryError:
        error = OutOfMemory("A process of the stage ran out of memory; use a smaller batch or sequence length.")
    except Exception as caught:  # noqa: BLE001 - the boundary of the process: rank 0 is told whatever it was
        traceback.print_exc()
        error = disk_full(caught) or ProcessDied(
            f"Process {rank + 1} of the {size} that train together failed: {type(caught).__name__}: {str(caught)[:500]}"
        )
    with contextlib.suppress(OSError):
        ranks.tell(folder, rank, error)
    return error.exit_code


if __name__ == "__main__":
    main()
