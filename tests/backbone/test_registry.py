"""Which plugin a model belongs to, and which names are refused before that plugin does anything."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest

from sinder_cli import Listing, UnavailableError, UsageError, hookimpl
from sinder_cli.backbone import registry
from sinder_cli.backbone.registry import InstalledBackbone, PluginEntry, hooks_for


def plugin_of(monkeypatch: pytest.MonkeyPatch, *names: Any) -> None:
    """Install one plugin, `toy`, that lists these names and can do nothing else."""
    module = ModuleType("toy_plugin")

    @hookimpl
    def sinder_listing() -> list[Any]:
        return [Listing(name, "") if isinstance(name, str) else name for name in names]

    module.sinder_listing = sinder_listing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_plugin", module)
    entry = EntryPoint("toy", "toy_plugin", "sinder.backbones")
    monkeypatch.setattr(registry, "installed_plugins", lambda: {"toy": PluginEntry("toy", "toy-vits", entry)})


def test_a_listed_name_is_taken_and_a_near_one_refused_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin_of(monkeypatch, "toy_small", "toy_large")
    assert hooks_for("toy_small").sinder_listing()
    with pytest.raises(UsageError, match=r"unknown model 'toy_smal': .*did you mean toy_small"):
        hooks_for("toy_smal")


def test_a_plugin_of_open_names_is_left_to_judge_them(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin_of(monkeypatch, "toy_small", "toy/OWNER/NAME")
    assert hooks_for("toy/somebody/something")
    assert hooks_for("toy_smal")


def test_a_plugin_that_lists_nothing_is_left_to_judge_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin_of(monkeypatch)
    assert hooks_for("toy_small")


def test_a_listing_of_something_else_is_told_by_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin_of(monkeypatch, 7)
    with pytest.raises(UnavailableError, match="cannot list plugin 'toy' of toy-vits: TypeError: 7 is no Listing"):
        hooks_for("toy_small")


@pytest.mark.parametrize(
    ("requires", "missing"),
    [
        ((), ()),
        (("json", "json.decoder"), ()),
        (("json", "no_such_library"), ("no_such_library",)),
        (("no_such_package.part", "json.no_such_part"), ("no_such_package.part", "json.no_such_part")),
    ],
)
def test_required_modules_that_are_not_installed_are_missing(
    requires: tuple[str, ...], missing: tuple[str, ...]
) -> None:
    plugin = PluginEntry("toy", "toy-vits", EntryPoint("toy", "toy_plugin", "sinder.backbones"))
    assert InstalledBackbone(plugin, Listing("toy", "", requires=requires)).missing == missing
    assert InstalledBackbone(plugin, None, "broken").missing == ()


def test_listing_and_refusing_a_name_import_no_torch() -> None:
    script = """
import sys
from sinder_cli import UsageError
from sinder_cli.backbone.registry import hooks_for, installed_backbones
assert [row.missing for row in installed_backbones()]
for model in ("demo_vitt", "dinov2_vits41"):
    try:
        hooks_for(model)
    except UsageError:
        continue
    raise AssertionError(model)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
