"""Pictures in a terminal: only one that is known to show them is asked, and no answer is left as typed input."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from select import select
from typing import Literal

ASKED = "SINDER_PICTURES"  # environment variable: 1 asks any terminal but a dumb one, 0 asks none
TERMINALS = ("xterm-kitty", "xterm-ghostty", "foot", "contour", "mlterm", "wezterm")  # how their TERM begins
PROGRAMS = ("iTerm.app", "iTerm2", "WezTerm", "ghostty", "contour", "mlterm")  # in TERM_PROGRAM or LC_TERMINAL
SIGNS = ("KITTY_WINDOW_ID", "KONSOLE_VERSION", "WEZTERM_PANE", "GHOSTTY_BIN_DIR", "ITERM_SESSION_ID", "MLTERM")
MULTIPLEXERS = ("tmux", "screen")  # they pass variables of the terminal on, but not its pictures

# Kitty's protocol, then the attributes: all terminals answer the latter, and in order: nothing comes after it.
QUESTION = b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\" + b"\x1b[c"
ATTRIBUTES = re.compile(rb"\x1b\[\?([\d;]*)c")
SIXEL = b"4"  # among the attributes
PATIENCE = 2.0  # seconds, for an answer over a slow line
SHOWN_COLUMNS = 160  # of the terminal, at most, that a picture is wide

Protocol = Literal["sixel", "kitty"]


def may_show_pictures(variables: Mapping[str, str]) -> bool:
    """Return True if the environment names a terminal that shows pictures, or if the user asks for them."""
    terminal, asked = variables.get("TERM", ""), variables.get(ASKED, "")
    if terminal in ("", "dumb") or asked == "0":
        return False
    if asked:
        return True
    if terminal.startswith(MULTIPLEXERS):
        return False
    programs = (variables.get("TERM_PROGRAM"), variables.get("LC_TERMINAL"))
    return (
        terminal.startswith(TERMINALS)
        or any(program in PROGRAMS for program in programs)
        or any(variables.get(sign) for sign in SIGNS)
    )


def show_picture(path: Path) -> None:
    """Show a picture in a terminal that speaks the protocol of kitty or sixel, if the extra `terminal` is there."""
    if not (sys.stdin.isatty() and sys.stdout.isatty() and may_show_pictures(os.environ)):
        return
    with suppress(Exception):  # the library is an extra, and a terminal may answer anything; the file is there
        from rich.console import Console

        with _library_asks_nothing():
            from textual_image._terminal import get_cell_size
            from textual_image.renderable import SixelImage, TGPImage
        protocol = protocol_of(sys.stdin.fileno(), sys.stdout.fileno())
        if protocol is None:
            return
        if not _tells_pixels(sys.stdout.fileno()):
            with _library_asks_nothing():
                get_cell_size()  # an ordinary size, which it remembers
        console = Console()
        image = SixelImage if protocol == "sixel" else TGPImage
        console.print(image(path, width=min(console.width, SHOWN_COLUMNS)))


def protocol_of(receiving: int, sending: int, patience: float = PATIENCE) -> Protocol | None:
    """Ask the terminal at these descriptors for its protocol of pictures; return None if it has none.

    Nothing is asked in the background, or where something was typed ahead, which would be taken for an answer. What
    answers until `patience`, in seconds, runs out is not left as typed input.
    """
    if os.tcgetpgrp(receiving) != os.getpgrp():
        return None
    kept = termios.tcgetattr(receiving)
    tty.setcbreak(receiving, termios.TCSANOW)
    try:
        if select([receiving], [], [], 0)[0]:
            return None
        os.write(sending, QUESTION)
        answer = _answer(receiving, patience)
    finally:
        termios.tcsetattr(receiving, termios.TCSANOW, kept)
    return told_protocol(answer)


def told_protocol(answer: bytes) -> Protocol | None:
    """Return the protocol that an answer to `QUESTION` names; sixel first: some know only a part of kitty's."""
    found = ATTRIBUTES.search(answer)
    if found is None:
        return None
    if SIXEL in found[1].split(b";"):
        return "sixel"
    return "kitty" if b"\x1b_Gi=31;OK" in answer else None


def _answer(receiving: int, patience: float) -> bytes:
    """Return what a terminal answers, up to its attributes or until `patience` runs out."""
    answer, end = b"", time.monotonic() + patience
    while not ATTRIBUTES.search(answer):
        left = end - time.monotonic()
        if left <= 0 or not select([receiving], [], [], left)[0]:
            break
        more = os.read(receiving, 1024)
        if not more:
            break
        answer += more
    return answer


@contextmanager
def _library_asks_nothing() -> Iterator[None]:
    """Keep textual-image from asking the terminal itself: it waits for .1 s, and leaves what comes later."""
    kept = sys.__stdout__
    vars(sys)["__stdout__"] = io.StringIO()  # no terminal
    try:
        yield
    finally:
        vars(sys)["__stdout__"] = kept


def _tells_pixels(terminal: int) -> bool:
    """Return True if the system knows the size of the terminal in pixels, so that it need not be asked."""
    size = fcntl.ioctl(terminal, termios.TIOCGWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
    return all(struct.unpack("HHHH", size))
