"""Failures that a user can cause or meet, each with an exit code that shell scripts can rely on."""

from __future__ import annotations

from typing import ClassVar

from sinder_cli.escaping import printable

MOST_LETTERS = 160  # quoted from another library's message; `--debug` shows the whole message


def excerpt(words: str) -> str:
    """Return the beginning of the first line of another library's message, for a quote in an error of ours."""
    line = (words.strip().splitlines() or [""])[0]
    return line if len(line) <= MOST_LETTERS else f"{line[: MOST_LETTERS - 1].rstrip()}…"


class SinderError(Exception):
    """A failure reported in one line: what failed, why, and what to do about it.

    A reason of several lines is joined to one line; other control characters are escaped.
    """

    exit_code: ClassVar[int] = 70
    found: object = None  # the results, if only writing them failed

    def __init__(self, what: str, why: str, remedy: str = "") -> None:
        super().__init__(what, why, remedy)
        self.what, self.why, self.remedy = what, why, remedy

    def __str__(self) -> str:
        reason = self.why + (f"; {self.remedy}" if self.remedy else "")
        return f"{printable(self.what)}: {printable(' '.join(reason.split()))}"


class UsageError(SinderError):
    """The command line or a settings file asks for something that does not exist."""

    exit_code = 2


class DefectsFoundError(SinderError):
    """The user asked to fail when defects are found, and they were."""

    exit_code = 1


class BadInputError(SinderError):
    """A checkpoint, image or layer map cannot be used as it is."""

    exit_code = 65


class NoInputError(SinderError):
    """A file or folder that was named is missing or empty."""

    exit_code = 66


class UnavailableError(SinderError):
    """A plugin, a library or a download that the command needs is not available."""

    exit_code = 69


class CannotCreateError(SinderError):
    """An output cannot be created in the requested place."""

    exit_code = 73


class StorageError(SinderError):
    """Reading or writing failed: an I/O error, or a full disk."""

    exit_code = 74


class TryAgainError(SinderError):
    """Out of memory, the folder is in use, or a process that helped has died: the same command may succeed later."""

    exit_code = 75


class ConflictError(SinderError):
    """Settings or plugins contradict each other."""

    exit_code = 78
