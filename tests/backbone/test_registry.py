"""Which plugin a model belongs to, and which names are refused before that plugin does anything."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from importlib.metadata import EntryPoint
from threading import Event
from types import ModuleType
from typing import Any

import pytest

from sinder_cli import Listing, UnavailableError, UsageError, hookimpl
from sinder_cli.backbone import registry
from sinder_cli.backbone.isolation import PluginEntry, contained
from sinder_cli.backbone.registry import InstalledBackbone, hooks_for, owner_of, unknown_model

FOLDER = "tests"  # a folder where the tests run
FILE = "README.md"  # and a file


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


def test_a_listed_name_is_taken_and_a_near_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin_of(monkeypatch, "toy_small", "toy_large")
    assert hooks_for("toy_small").sinder_listing()
    with pytest.raises(UsageError, match=r"unknown model 'toy_smal': .*did you mean toy_small"):
        hooks_for("toy_smal")


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("somebody/something", "a repository is named toy/somebody/something"),
        ("something.PTH", "give the file with --weights"),
        ("https://example.org/something.pth", "download the file, and give it with --weights"),
        ("STOY_SMALL", r"did you mean toy_small\?"),
        ("something", "needs a prefix, as in toy/something"),
        (FILE, f"this is a file: the model comes first, as in `sinder analyze dinov2_vits14 {FILE}`"),
        (FOLDER, f"is no run directory; a model in a folder is named toy/./{FOLDER}"),
    ],
)
def test_an_unknown_name_is_refused_with_the_likely_meant_one(model: str, hint: str) -> None:
    listings = [Listing(name, "") for name in ("toy_small", "toy/OWNER/NAME", "toy/./FOLDER", "toy/NAME")]
    with pytest.raises(UsageError, match=rf"unknown model '{model}': no installed plugin offers it; .*{hint}"):
        raise unknown_model(model, listings)


def test_a_plugin_of_open_names_is_left_to_judge_them(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin_of(monkeypatch, "toy_small", "toy/OWNER/NAME")
    assert hooks_for("toy/somebody/something")
    assert hooks_for("toy_smal")


def test_a_plugin_without_a_list_judges_its_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin_of(monkeypatch)
    assert hooks_for("toy_small")


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


BROKEN_ROWS = [
    (7, "TypeError: 7 is no Listing"),
    (Listing("toy_small", "", parameters="many"), "parameters: it must be a whole number"),  # type: ignore[arg-type]
    (Listing("toy_small", "", requires="timm"), "requires: it must be a list"),  # type: ignore[arg-type]
    (Listing("demo_vit", ""), "model 'demo_vit' does not begin with 'toy'"),
]


@pytest.mark.parametrize(("row", "words"), BROKEN_ROWS)
def test_a_row_that_would_break_the_table_is_refused(row: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin_of(monkeypatch, row)
    with pytest.raises(UnavailableError) as caught:
        hooks_for("toy_small")
    assert str(caught.value).startswith("cannot list plugin 'toy' of toy-vits: ")
    assert words in str(caught.value)


def test_a_listing_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin_of(monkeypatch, "toy_small")
    released = Event()
    monkeypatch.setattr(sys.modules["toy_plugin"], "sinder_listing", hookimpl(lambda: released.wait(60)))
    monkeypatch.setattr(registry, "contained", partial(contained, seconds=0.3))
    with pytest.raises(UnavailableError, match=r"cannot list plugin 'toy' of toy-vits: it hangs: .* within 0\.3 s"):
        hooks_for("toy_small")
    released.set()


def plugin(name: str, distribution: str) -> PluginEntry:
    return PluginEntry(name, distribution, EntryPoint(name, f"{name}_plugin", "sinder.backbones"))


@pytest.mark.parametrize(
    ("model", "owner"),
    [
        ("foo_small", "foo"),
        ("foo/somebody/something", "foo"),
        ("foo_bar_small", "foo_bar"),  # the longest name
        ("foobar", None),
        ("demo_vit", "demo"),  # a built-in one's, whoever else has a longer name
        ("demo_vit_tiny", "demo"),
        ("FOO_small", None),
    ],
)
def test_which_plugin_a_model_belongs_to(model: str, owner: str | None) -> None:
    others = {name: plugin(name, "foo-vits") for name in ("foo", "foo_bar", "demo_vit")}
    found = owner_of(model, others | {"demo": plugin("demo", "sinder-cli")})
    assert (found and found.name) == owner


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
