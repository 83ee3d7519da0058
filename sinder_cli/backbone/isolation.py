"""Isolation of plugins: an error in a plugin's code is reported as that plugin's failure and stops nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import wraps
from importlib.metadata import EntryPoint
from threading import Thread
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sinder_cli.errors import BadInputError, SinderError, UnavailableError
from sinder_cli.memory import is_out_of_memory

if TYPE_CHECKING:
    from pathlib import Path

    from sinder_cli.backbone.contract import Backbone
    from sinder_cli.backbone.hooks import ModelRequest
    from sinder_cli.backbone.sources import TensorSource
    from sinder_cli.backbone.weights import Weights

T = TypeVar("T")
P = ParamSpec("P")

LIMIT_SECONDS = 10.0  # for importing a plugin, and again for its listing


@dataclass(frozen=True)
class PluginEntry:
    """An installed plugin, loaded or not; `rivals` are other distributions that provide a plugin of the same name."""

    name: str
    distribution: str
    entry_point: EntryPoint
    rivals: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"plugin {self.name!r} of {self.distribution}"


class BrokenPluginError(Exception):
    """A plugin did not return; the message says in one line what it did. Its own exception, if any, is the cause."""


def contained(call: Callable[[], T], seconds: float = LIMIT_SECONDS) -> T:
    """Return the result of `call`. Raises `BrokenPluginError` if it raises, exits or does not finish in time.

    It runs in a thread of its own, which is abandoned after the time limit; an alarm would not do, since the plugin
    could catch its exception. The calling thread waits and stays open to the user's signals. Whatever is printed
    meanwhile goes to standard error, because standard output carries results.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # sys.exit too; Ctrl-C never reaches this thread
            outcome.set_exception(error)

    with redirect_stdout(sys.stderr):
        Thread(target=run, daemon=True).start()
        wait([outcome], seconds)
    if not outcome.done():
        raise BrokenPluginError(f"it hangs: it did not finish within {seconds:g} s")
    error = outcome.exception()
    if error is not None:
        raise BrokenPluginError(_words(error)) from error
    return outcome.result()


def _words(error: BaseException) -> str:
    return _fault_in_record(error) or f"{type(error).__name__}: {error}"


def _fault_in_record(error: BaseException) -> str:
    """Return what is wrong with a record, and where, if the error is pydantic's; else nothing."""
    from pydantic import ValidationError  # loaded once something has gone wrong

    from sinder_cli.faults import first_fault

    if not isinstance(error, ValidationError):
        return ""
    place, why = first_fault(error)
    return f"{'.'.join(place)}: {why}" if place else why


@contextmanager
def blamed(plugin: PluginEntry, model: str) -> Iterator[None]:
    """Report an exception or exit in a plugin's code for a model as the plugin's failure.

    Raises `BadInputError` for an invalid layer map, else `UnavailableError`. `SinderError`, `OSError` and lack of
    memory pass unchanged; the last two are this machine's failures.
    """
    try:
        yield
    except (SinderError, OSError):
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        if fault := _fault_in_record(error):
            raise BadInputError(f"bad layer map of {model!r}", fault) from error
        raise UnavailableError(f"{plugin} failed at {model!r}", _words(error), "tell its author") from error


@dataclass(frozen=True)
class Hooks:
    """The hooks of one loaded plugin and the functions of its backbones; errors are reported as the plugin's failure.

    Only `sinder_listing` is called directly: its callers use `contained`.
    """

    plugin: PluginEntry
    caller: Any  # pluggy's, or any object with the three hooks

    def sinder_listing(self) -> Any:
        return self.caller.sinder_listing()

    def sinder_weights(self, request: ModelRequest) -> Path | TensorSource | None:
        with blamed(self.plugin, request.model):
            return self.caller.sinder_weights(request=request)

    def sinder_backbone(self, request: ModelRequest, weights: Weights) -> Backbone:
        with blamed(self.plugin, request.model):
            from sinder_cli.backbone.contract import Backbone

            backbone = self.caller.sinder_backbone(request=request, weights=weights)
            if not isinstance(backbone, Backbone):  # None where it lacks the hook
                raise TypeError(f"its sinder_backbone returned {type(backbone).__name__}, no Backbone")
        return replace(
            backbone,
            build=self._blamed(backbone.build, request.model),
            embed=self._blamed(backbone.embed, request.model),
            run_block=self._blamed(backbone.run_block, request.model),
            finish=self._blamed(backbone.finish, request.model),
            forward=backbone.forward and self._blamed(backbone.forward, request.model),
        )

    def _blamed(self, call: Callable[P, T], model: str) -> Callable[P, T]:
        @wraps(call)
        def guarded(*arguments: P.args, **named: P.kwargs) -> T:
            with blamed(self.plugin, model):
                return call(*arguments, **named)

        return guarded
