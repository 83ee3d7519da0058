"""A plugin's code runs where it can neither end the command, nor hold it up, nor write into its results."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from sinder_cli.backbone.isolation import BrokenPluginError, contained


def test_what_is_returned_is_passed_on() -> None:
    assert contained(lambda: [1, 2]) == [1, 2]


def raising(failure: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise failure

    return fail


@pytest.mark.parametrize("failure", [ValueError("no"), SystemExit(3), KeyboardInterrupt("no"), TimeoutError("no")])
def test_whatever_is_raised_becomes_the_cause_of_one_failure(failure: BaseException) -> None:
    with pytest.raises(BrokenPluginError, match=f"{type(failure).__name__}: (no|3)") as caught:
        contained(raising(failure))
    assert caught.value.__cause__ is failure


def test_what_hangs_is_left_behind_though_it_swallows_every_exception() -> None:
    released = threading.Event()

    def stubborn() -> None:
        while not released.is_set():
            with suppress(BaseException):
                time.sleep(0.01)

    began = time.monotonic()
    with pytest.raises(BrokenPluginError, match=r"it hangs: it did not finish within 0\.2 s"):
        contained(stubborn, seconds=0.2)
    assert 0.2 <= time.monotonic() - began < 5
    released.set()


def test_a_thread_left_behind_does_not_keep_the_process() -> None:
    released = threading.Event()
    with pytest.raises(BrokenPluginError):
        contained(lambda: threading.current_thread() and released.wait(60), seconds=0.05)
    left = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    assert [thread for thread in left if not thread.daemon] == []
    released.set()


def test_the_users_signal_is_heard_while_a_plugin_hangs() -> None:
    released = threading.Event()
    previous = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            contained(lambda: released.wait(60), seconds=30)
    finally:
        signal.signal(signal.SIGALRM, previous)
        released.set()


def test_what_is_printed_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    contained(lambda: print("hello"))
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "hello\n")
    assert sys.stdout is not sys.stderr
