"""Search for task plugins: entry points are listed without being loaded, and only the named ones are imported."""

from __future__ import annotations

import difflib
from dataclasses import replace
from importlib.util import find_spec

from sinder_cli.backbone.contract import TASK_GROUP
from sinder_cli.backbone.isolation import PluginEntry
from sinder_cli.backbone.registry import allowed_names, hooks_of, installed_plugins, is_built_in
from sinder_cli.errors import UnavailableError, UsageError
from sinder_cli.evaluation import contract
from sinder_cli.evaluation.contract import Task


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
    task = hooks_of(entry, contract).sinder_task()
    if not isinstance(task, Task):
        raise UnavailableError(f"cannot use task {name!r}", f"{entry} returned no Task", "tell its author")
    missing = [module for module in task.requires if find_spec(module) is None]
    if missing:
        why = f"it needs {missing[0]}, which is not installed"
        raise UnavailableError(f"cannot run task {name!r}", why, "pip install 'sinder-cli[evaluate]'")
    return replace(task, name=name)
