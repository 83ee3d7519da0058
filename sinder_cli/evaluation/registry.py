"""Search for task plugins: entry points are listed without being loaded, and only the named ones are imported."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

from sinder_cli.backbone.hooks import TASK_GROUP
from sinder_cli.backbone.isolation import BrokenPluginError, PluginEntry, contained
from sinder_cli.backbone.registry import allowed_names, hooks_of, installed_plugins, is_built_in
from sinder_cli.errors import SinderError, UnavailableError, UsageError
from sinder_cli.evaluation import contract
from sinder_cli.evaluation.contract import Task
from sinder_cli.memory import is_out_of_memory


def installed_tasks() -> dict[str, PluginEntry]:
    """Return every task plugin that may load by name, without importing any."""
    named = allowed_names()
    tasks = installed_plugins(TASK_GROUP)
    return {name: entry for name, entry in tasks.items() if not named or name in named or is_built_in(entry)}


def task_named(name: str) -> Task:
    """Return a task by name. Raises `UsageError` for an unknown one, `UnavailableError` for one that cannot run."""
    tasks = installed_tasks()
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(tasks)}"
        raise UsageError(f"unknown task {name!r}", "no installed plugin offers it", hint)
    entry = tasks[name]
    hooks = hooks_of(entry, contract)
    try:
        task = contained(hooks.sinder_task)
    except BrokenPluginError as broken:
        raise UnavailableError(f"cannot use task {name!r}", str(broken), "tell its author") from broken.__cause__
    if not isinstance(task, Task):
        raise UnavailableError(f"cannot use task {name!r}", f"{entry} returned no Task", "tell its author")
    missing = [module for module in task.requires if find_spec(module) is None]
    if missing:
        why = f"it needs {missing[0]}, which is not installed"
        raise UnavailableError(f"cannot run task {name!r}", why, "pip install 'sinder-cli[evaluate]'")
    return replace(task, name=name)


MACHINE = frozenset({errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EIO})  # faults of this machine, not of a task


@contextmanager
def blamed(task: Task) -> Iterator[None]:
    """Report an exception in a task's own code as that task's failure; ours, and the machine's, pass."""
    try:
        yield
    except SinderError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in MACHINE):
            raise
        why = f"{type(error).__name__}: {error}"
        raise UnavailableError(f"task {task.name!r} failed", why, "tell its author") from error
