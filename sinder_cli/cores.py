"""The cores that this process may use: those it is bound to, and no more than its container is given time on."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

QUOTA_V2 = Path("/sys/fs/cgroup/cpu.max")
QUOTA_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # environment variables that torch heeds


def usable_cores() -> int:
    """Return the number of cores that the process is bound to (`taskset`), or that its cgroup has time on, if fewer."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return bound if quota is None else max(1, min(bound, math.ceil(quota)))


def _quota() -> float | None:
    """Return the cores' worth of time of the cgroup; None if it is not limited, or not to be found."""
    with suppress(OSError, ValueError):
        given, period = QUOTA_V2.read_text().split()
        return None if given == "max" else int(given) / int(period)
    with suppress(OSError, ValueError):
        time, each = (int(path.read_text()) for path in QUOTA_V1)
        return time / each if time > 0 else None
    return None


def heed_quota() -> None:
    """Let torch take no more threads than the container has cores: by itself it heeds `taskset`, but no quota.

    To be called before torch is imported. A number that the user gives stays.
    """
    if not any(name in os.environ for name in THREADS) and _quota() is not None:
        os.environ["OMP_NUM_THREADS"] = str(usable_cores())
