"""Finding plugins: entry points are listed without being loaded, and only the one that is named is imported."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

import pluggy

from sinder_cli.backbone import hookspecs
from sinder_cli.backbone.describe import Listing
from sinder_cli.errors import ConflictError, SinderError, UnavailableError, UsageError


@dataclass(frozen=True)
class PluginEntry:
    """A plugin that is installed, loaded or not."""

    name: str
    distribution: str
    entry_point: EntryPoint


@dataclass(frozen=True)
class InstalledBackbone:
    """One row of `sinder backbones`: a listing, or the reason why its plugin could not be loaded."""

    plugin: PluginEntry
    listing: Listing | None
    problem: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """The modules that the model requires and that are not installed; none of them is imported to find out."""
        return tuple(name for name in self.listing.requires if not _is_there(name)) if self.listing else ()


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # the package around it is missing, or has no spec
        return False


def installed_plugins() -> dict[str, PluginEntry]:
    """Every plugin by name, none of them imported. Raises `ConflictError` for two of one name."""
    found: dict[str, PluginEntry] = {}
    for entry in sorted(entry_points(group=hookspecs.ENTRY_POINT_GROUP), key=lambda e: e.name):
        distribution = entry.dist.name if entry.dist else "unknown"
        known = found.get(entry.name)
        if known and known.entry_point.value != entry.value:
            raise ConflictError(
                f"two plugins are called {entry.name!r}",
                f"{known.distribution} and {distribution} both provide it",
                "uninstall one of them",
            )
        found[entry.name] = PluginEntry(entry.name, distribution, entry)
    return found


def plugin_name_of(model: str, names: list[str]) -> str | None:
    """The longest plugin name that a model name begins with: `dinov2_vitg14` → dinov2, `hf/…` → hf."""
    owners = [name for name in names if re.match(rf"{re.escape(name)}($|[_/])", model)]
    return max(owners, key=len, default=None)


def load_plugin(plugin: PluginEntry) -> Any:
    """Import one plugin and return its hook caller. Raises `UnavailableError` naming the distribution."""
    where = f"cannot load plugin {plugin.name!r} of {plugin.distribution}"
    try:
        module = plugin.entry_point.load()
    except (Exception, SystemExit) as error:
        raise UnavailableError(where, f"{type(error).__name__}: {error}", "install or repair that package") from error
    api = getattr(module, "SINDER_API", hookspecs.SINDER_API)
    if api != hookspecs.SINDER_API:
        raise UnavailableError(where, f"it is written for SINDER_API {api}, this is {hookspecs.SINDER_API}")
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(module, plugin.name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise UnavailableError(where, str(error)) from error
    return manager.hook


def hooks_for(model: str) -> Any:
    """The hooks of the plugin that a model name belongs to; of them only the listing has been called.

    Raises `UsageError` with near names if no plugin offers the model, `UnavailableError` if its plugin breaks.
    """
    plugins = installed_plugins()
    name = plugin_name_of(model, list(plugins))
    if name is None:
        raise unknown_model(model)
    hooks = load_plugin(plugins[name])
    if not _offers(model, _listings(plugins[name], hooks)):
        raise unknown_model(model)
    return hooks


def _offers(model: str, listings: list[Listing]) -> bool:
    """Whether a model is listed; a plugin that lists nothing, or a name with a `/`, may take names it does not list."""
    names = [listing.name for listing in listings]
    return not names or model in names or any("/" in name for name in names)


def _listings(plugin: PluginEntry, hooks: Any) -> list[Listing]:
    """What a plugin lists. Raises `UnavailableError` for a listing that fails or lists something else."""
    try:
        listings = list(hooks.sinder_listing() or ())
        if strange := next((row for row in listings if not isinstance(row, Listing)), None):
            raise TypeError(f"{strange!r} is no Listing")
    except Exception as error:  # of the plugin's own code
        where = f"cannot list plugin {plugin.name!r} of {plugin.distribution}"
        raise UnavailableError(where, f"{type(error).__name__}: {error}", "tell its author") from error
    return listings


def unknown_model(model: str) -> UsageError:
    """The error for a model that nobody offers, suggesting the nearest names."""
    names = [row.listing.name for row in installed_backbones() if row.listing]
    near = difflib.get_close_matches(model, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`sinder backbones` lists the models"
    return UsageError(f"unknown model {model!r}", "no installed plugin offers it", hint)


def installed_backbones() -> Iterator[InstalledBackbone]:
    """Every listed model of every plugin; a plugin that cannot be loaded gives a row with its problem."""
    for plugin in installed_plugins().values():
        try:
            listings = _listings(plugin, load_plugin(plugin))
        except SinderError as error:
            yield InstalledBackbone(plugin, None, str(error))
            continue
        for listing in listings:
            yield InstalledBackbone(plugin, listing)
