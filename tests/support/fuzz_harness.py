"""Runs cases in child processes under limits: each ends well or is refused by us, and nothing else happens.

A child is forked for as many cases as it outlives, so that a case costs milliseconds. In it no case may take over 10 s
of processor time or 2 GiB beyond what the process began with, start a program, or open a connection. An exception
that passes for a plugin's bug is a failure.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sinder_cli.errors import SinderError
from sinder_cli.images.decoding import UnreadableImageError

MOST_SECONDS, MOST_BYTES = 10, 2 << 30
WALL_SECONDS = 60  # for a case that waits instead of working
OURS = (SinderError, UnreadableImageError)
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "subprocess.Popen", "socket.connect")
EXTREMES = (0, 1, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)

# What stands in the place of a field's value; `missing` is the field left out.
MISSING = object()
VALUES: dict[str, Any] = {
    "missing": MISSING,
    "null": None,
    "negative": -1,
    "zero": 0,
    "fraction": 0.5,
    "many": 10**12,
    "huge": 10**30,
    "infinite": float("inf"),
    "not a number": float("nan"),
    "text": "text",
    "true": True,
    "list": [1, "a"],
    "empty list": [],
    "table": {"a": 1},
}


class Case(NamedTuple):
    """One input: a name that finds it again, and what is done with it."""

    name: str
    run: Callable[[], object]


class Outcome(NamedTuple):
    """How a case ended: `taken`, `refused` by an error of ours, or `failed`."""

    name: str
    kind: str
    words: str


def outcomes(cases: Sequence[Case]) -> list[Outcome]:
    """Run all cases in turn; one that ends its process is a failure, and the next goes on in a new one."""
    found: list[Outcome] = []
    while len(found) < len(cases):
        found += _in_a_child(cases[len(found) :])
    return found


def require_ours(
    cases: Sequence[Case], least_refused: float = 0.0, known: Mapping[str, str] | None = None
) -> Counter[str]:
    """Assert that each case is taken or refused, and that so great a share is refused: the damage must be real.

    `known` are failures that are not mended yet, by a regular expression: cases whose name matches are not run, and
    failures whose name and words match are let pass. Each has its reason, and a skipped test that names it.
    """
    patterns = [re.compile(pattern) for pattern in known or {}]
    kept = [case for case in cases if not any(pattern.fullmatch(case.name) for pattern in patterns)]
    found = outcomes(kept)
    lines = [f"{each.name}: {each.words}" for each in found if each.kind == "failed"]
    failed = [line for line in lines if not any(pattern.fullmatch(line) for pattern in patterns)]
    assert not failed, f"{len(failed)} of {len(found)} failed:\n" + "\n".join(failed[:40])
    counts = Counter(each.kind for each in found)
    print(f"{len(found)} cases: {dict(counts)}, {len(cases) - len(kept)} not run since they are known to fail")
    assert counts["refused"] >= least_refused * len(found), counts
    return counts


def _in_a_child(cases: Sequence[Case]) -> list[Outcome]:
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which these children do without
        pid = os.fork()
    if pid == 0:
        os.close(reading)
        _be_child(cases, writing)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as lines:
        found = [Outcome(*json.loads(line)) for line in lines if line.endswith("\n")]
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        told = {signal.SIGPROF: f"over {MOST_SECONDS} s of work", signal.SIGALRM: f"over {WALL_SECONDS} s"}
        why = told.get(signal.Signals(number), f"died of {signal.Signals(number).name}")
        found.append(Outcome(cases[len(found)].name, "failed", why))
    elif len(found) < len(cases):
        found.append(Outcome(cases[len(found)].name, "failed", f"exit {os.WEXITSTATUS(status)}"))
    return found


def _be_child(cases: Sequence[Case], writing: int) -> None:
    """Run the cases and tell of each; never returns."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    most = _virtual_bytes() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    caught: list[str] = []
    sys.addaudithook(lambda event, _: caught.append(event) if event in FORBIDDEN else None)
    for case in cases:
        caught.clear()
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        kind, words = _tried(case)
        if caught:
            kind, words = "failed", f"it did {', '.join(caught)}"
        os.write(writing, (json.dumps([case.name, kind, words]) + "\n").encode())
    os._exit(0)


def _tried(case: Case) -> tuple[str, str]:
    try:
        case.run()
    except OURS as error:
        bug = "tell its author" in str(error)  # whatever a plugin raises becomes an error of ours
        return "failed" if bug else "refused", str(error)
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if "sinder_" in frame.filename or "plugins" in frame.filename
        ]
        place = ours[-1] if ours else place
        return "failed", f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
    return "taken", ""


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def mutated(document: Any, place: Sequence[str | int], value: Any) -> Any:
    """A copy of a JSON document with another value, or none, at one place."""
    copy = json.loads(json.dumps(document))
    at = copy
    for step in place[:-1]:
        at = at[step]
    if value is MISSING:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    return copy


def places_in(document: Any, above: tuple[str | int, ...] = ()) -> Iterable[tuple[str | int, ...]]:
    """The way to every value of a JSON document, tables and lists included."""
    parts = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for name, value in parts:
        yield (*above, name)
        yield from places_in(value, (*above, name))


def damaged(content: bytes, draw: random.Random, within: int | None = None) -> bytes:
    """Bytes flipped, cut out, put in, overwritten by an extreme number, or the end cut off; in the first `within`."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(max(1, min(within or len(data), len(data))))
        way = draw.randrange(6)
        if way == 0:
            data[at : at + 1] = bytes([data[at] ^ 1 << draw.randrange(8)]) if data else b""
        elif way == 1:
            del data[at : at + draw.choice((1, 4, 100))]
        elif way == 2:
            data[at:at] = draw.randbytes(draw.choice((1, 4, 100)))
        elif way == 3:
            width = draw.choice((1, 2, 4, 8))
            number = draw.choice(EXTREMES) & (256**width - 1)
            data[at : at + width] = number.to_bytes(width, draw.choice(("little", "big")))
        elif way == 4:
            data[at : at + 8] = draw.randbytes(8)
        else:
            del data[draw.randrange(max(1, len(data))) :]
    return bytes(data)
