"""Several processes of one run on the command line: what is told is told once."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager

from sinder_cli.distributed import LostRankError, Ranks, joined, launched, tells
from sinder_cli.report.progress import say

SECONDS_TO_TELL = 1.0  # for the process that tells; torchrun ends all others when the first has ended


def shared() -> AbstractContextManager[Ranks]:
    """This process's place among those that `torchrun` has started; alone without it."""
    return joined(_abandon)


def tell(line: str) -> None:
    """Say on standard error why this process ends, unless another one of the same run does."""
    if tells(launched()):
        say(line)
    else:
        time.sleep(SECONDS_TO_TELL)


def _abandon(error: LostRankError) -> None:
    """End at once, whatever the main thread waits for."""
    tell(f"sinder: error: {error}")
    os._exit(error.exit_code)
