"""Stopping by a signal: at once, or after work that must not be interrupted."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Ended(BaseException):
    """SIGINT or SIGTERM arrived; raised in the main thread so that half-written files are removed on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


def death_words(returncode: int) -> str:
    """Return why a child died, from its negative return code: `it died of SIGSEGV (Segmentation fault)`."""
    number = -returncode
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"it died of signal {number}"
    return f"it died of {name} ({signal.strsignal(number)})"


def was_sent(returncode: int) -> bool:
    """Return True if a child died of a signal from outside; other signals are caused by the process itself."""
    return -returncode in {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGKILL}


class Stop:
    """Handler that turns signals into `Ended`; while deferred, it only stores the first signal in `asked`.

    With `once`, a second signal is ignored while deferred: a cluster signals torchrun and its processes, and torchrun
    signals them again. `say` is called at once with a message about the stored signal; the call comes from a signal
    handler, between any two instructions.
    """

    def __init__(self, once: bool = False, say: Callable[[str], object] = lambda _: None) -> None:
        self.asked: int | None = None
        self._once = once
        self._say = say
        self._deferred = False

    def hear(self, number: int) -> None:
        """Handle a signal. Raises `Ended` unless it is the first while deferred, or a later one with `once`."""
        if self._deferred and (self.asked is None or self._once):
            if self.asked is None:
                self.asked = number
                then = "" if self._once else "; a second signal ends at once"
                self._say(f"stopping after this step, with a checkpoint{then}")
            return
        raise Ended(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Store the first signal in `asked` inside; a second one raises `Ended` at once, unless `once` is set."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
