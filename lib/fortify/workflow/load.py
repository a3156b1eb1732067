"""How OpenMP's threads wait for each other, chosen by what else the machine is doing.

A thread that waits spins. On a quiet machine that is fastest. On a busy one the spinning thread keeps the
core from the thread that it waits for, so there it spins for a short while only.
"""

import os
import time
from pathlib import Path

BUSY_CORES = 0.4  # of other processes, from which on waiting threads sleep soon
SPINS = "1000"
_STAT = Path("/proc/stat")


def cores_in_use(seconds: float = 0.25, *, stat: Path = _STAT) -> float:
    """How many cores' worth of time all processes take now; 0 where the system does not say (no /proc)."""
    before = _times(stat)
    time.sleep(seconds)
    after = _times(stat)
    if before is None or after is None:
        return 0.0
    return used_cores(before, after)


def used_cores(before: tuple[int, int, int], after: tuple[int, int, int]) -> float:
    """Cores in use between two readings (idle, all, cores) of the processor's clock ticks."""
    idle, all_ = (late - early for early, late in zip(before[:2], after[:2], strict=True))
    return after[2] * (1 - idle / all_) if all_ else 0.0


def waiting(in_use: float) -> dict[str, str]:
    """The environment of a kernel that starts while ``in_use`` cores are; what the user set stays."""
    if in_use < BUSY_CORES or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return {}
    return {"GOMP_SPINCOUNT": SPINS}


def _times(stat):
    """(idle, all, cores): clock ticks of all processors since the start, and how many there are."""
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return None
    ticks = [int(field) for field in lines[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks), sum(line.startswith("cpu") for line in lines) - 1
