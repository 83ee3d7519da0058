"""Being asked to stop by a signal: at once, or after what must not be broken off."""

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
    """What a child died of, from its negative return code: `it died of SIGSEGV (Segmentation fault)`."""
    number = -returncode
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"it died of signal {number}"
    return f"it died of {name} ({signal.strsignal(number)})"


def was_sent(returncode: int) -> bool:
    """Whether the signal that a child died of comes from outside; the others are raised by what a process does."""
    return -returncode in {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGKILL}


class Stop:
    """Turns signals into `Ended`; while it is deferred, the first one only leaves word in `asked`.

    `once`: no second one counts then. A cluster signals torchrun and its processes, and torchrun signals them again.
    `say` is told at once that the first is waiting; it is called by a signal handler, between any two instructions.
    """

    def __init__(self, once: bool = False, say: Callable[[str], object] = lambda _: None) -> None:
        self.asked: int | None = None
        self._once = once
        self._say = say
        self._deferred = False

    def hear(self, number: int) -> None:
        """A signal came in. Raises `Ended` unless it is the first while deferred."""
        if self._deferred and (self.asked is None or self._once):
            if self.asked is None:
                self.asked = number
                then = "" if self._once else "; a second signal ends at once"
                self._say(f"stopping after this step, with a checkpoint{then}")
            return
        raise Ended(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the first signal waits to be asked for; a second one ends at once."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
