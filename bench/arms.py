"""What the benches share that measure processes: running an arm, and holding what was found against the goals.

No torch here: a child counts the memory of the process that it was started from as its own peak.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence


def run(command: Sequence[str], *, threads: int) -> dict[str, float]:
    """Run a command to its end; what the kernel counted for it: ``rss_gib`` (peak), ``cpu`` (user + system) and ``wall``, seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ... failed")
    return {"rss_gib": usage.ru_maxrss / 2**20, "cpu": usage.ru_utime + usage.ru_stime, "wall": time.monotonic() - started}


def goals_table(found: Mapping[str, tuple[float, float]]) -> list[str]:
    """Markdown lines; ``found`` maps a goal to what was measured and the most it may be."""
    return [
        "| goal | at most | found | |",
        "|---|---|---|---|",
        *(f"| {name} | {most:g} | {value:.4g} | {'met' if value <= most else 'missed'} |" for name, (value, most) in found.items()),
    ]
