"""What mkdocs runs beside itself: public names are documented and in the reference; nothing comes from elsewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

import sinder_cli
from sinder_cli import tasks

REFERENCE = Path(__file__).with_name("api.md")
VALUES = (int, float, str, tuple, frozenset)  # constants, which have no docstring of their own


def on_pre_build(config: Any) -> None:  # noqa: ARG001  # the argument that mkdocs gives
    """End the build at public names that have no docstring, or that the reference leaves out."""
    public = {name: getattr(module, name) for module in (sinder_cli, tasks) for name in module.__all__}
    bare = [name for name, value in public.items() if _needs_words(value) and not inspect.getdoc(value)]
    reference = REFERENCE.read_text(encoding="utf-8")
    shown = set(re.findall(r"\w+", reference))
    whole = "::: sinder_cli.tasks" in reference  # with all of its members
    missing = [name for name in sinder_cli.__all__ if _needs_words(public[name]) and name not in shown] + (
        [] if whole else list(tasks.__all__)
    )
    if bare or missing:
        raise PluginError(f"without a docstring: {bare or 'none'}; not in docs/api.md: {missing or 'none'}")


def on_post_build(config: Any) -> None:
    """Take the stand-in for workers from the site itself; the theme would load it from elsewhere."""
    site = Path(config["site_dir"])
    for path in site.rglob("*.html"):
        own = "../" * (len(path.relative_to(site).parts) - 1) + "assets/worker.js"
        page = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r'"https://unpkg\.com/iframe-worker/shim"', f'"{own}"', page), encoding="utf-8")


def _needs_words(value: Any) -> bool:
    return not isinstance(value, VALUES) and (inspect.isclass(value) or inspect.isfunction(value))
