"""Plugins import `sinder_cli` itself and nothing below it, and the linter knows all there is below it."""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path

import sinder_cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_every_part_of_the_core_is_forbidden_to_plugins() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    contract = next(contract for contract in contracts if contract.get("source_modules") == ["sinder_plugins"])
    parts = {f"sinder_cli.{part.name}" for part in pkgutil.iter_modules(sinder_cli.__path__)}
    assert set(contract["forbidden_modules"]) == parts - {"sinder_cli.__main__", "sinder_cli.tasks"}
