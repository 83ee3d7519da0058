"""Finding plugins: entry points are listed without being loaded, and only the one that is named is imported."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pluggy
from pydantic import TypeAdapter

from sinder_cli.backbone import contract
from sinder_cli.backbone.contract import Listing
from sinder_cli.backbone.isolation import BrokenPluginError, Hooks, PluginEntry, contained
from sinder_cli.errors import ConflictError, SinderError, UnavailableError, UsageError

OWN_DISTRIBUTION = "sinder-cli"  # its plugins are the built-in ones
FOLDER = "/./FOLDER"  # in the listing of a plugin that takes folders
CHECKPOINT_ENDINGS = (".pth", ".pt", ".safetensors", ".bin", ".ckpt", ".tar", ".npz", ".onnx")
ALLOWED = "SINDER_PLUGINS"  # the environment variable that names the plugins that may load, with commas between


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
    except (Exception, SystemExit):  # the package around it is missing, has no spec, or breaks
        return False


def installed_plugins() -> dict[str, PluginEntry]:
    """Every plugin by name, none of them imported. Where two have one name, the entry of the first names its rivals."""
    found: dict[str, PluginEntry] = {}
    for entry in sorted(entry_points(group=contract.ENTRY_POINT_GROUP), key=lambda e: e.name):
        distribution = entry.dist.name if entry.dist else "unknown"
        known = found.get(entry.name)
        if known is None:
            found[entry.name] = PluginEntry(entry.name, distribution, entry)
        elif (known.distribution, known.entry_point.value) != (distribution, entry.value):
            found[entry.name] = replace(known, rivals=(*known.rivals, distribution))
    return found


def allowed_plugins(plugins: Mapping[str, PluginEntry]) -> dict[str, PluginEntry]:
    """Those that `SINDER_PLUGINS` names, or all where it is not set. Raises `UsageError` for a name that is none."""
    named = [name.strip() for name in os.environ.get(ALLOWED, "").split(",") if name.strip()]
    if unknown := [name for name in named if name not in plugins]:
        why = f"no plugin {unknown[0]!r} is installed"
        raise UsageError(f"{ALLOWED} names an unknown plugin", why, f"there are {', '.join(plugins)}")
    return {name: plugin for name, plugin in plugins.items() if not named or name in named}


def owner_of(model: str, plugins: Mapping[str, PluginEntry]) -> PluginEntry | None:
    """The plugin that a model name begins with: `dinov2_vitg14` → dinov2, `hf/…` → hf.

    A built-in plugin has all names that begin with its own: nobody's `demo_vit` stands between a user and `demo`.
    Among those of others the longest name owns the model.
    """
    owners = [name for name in plugins if _begins_with(model, name)]
    built_in = [name for name in owners if _is_built_in(plugins[name])]
    return plugins[max(built_in or owners, key=len)] if owners else None


def _begins_with(model: str, plugin: str) -> bool:
    return re.match(rf"{re.escape(plugin)}($|[_/])", model) is not None


def _is_built_in(plugin: PluginEntry) -> bool:
    return OWN_DISTRIBUTION in (plugin.distribution, *plugin.rivals)


def require_unrivalled(plugin: PluginEntry) -> None:
    """Raises `ConflictError` for a plugin whose name another distribution's has as well."""
    if plugin.rivals:
        providers = " and ".join(sorted({plugin.distribution, *plugin.rivals}))
        why = f"provided by {providers}"
        raise ConflictError(f"two plugins are called {plugin.name!r}", why, "uninstall one of them")


def load_plugin(plugin: PluginEntry) -> Hooks:
    """Import one plugin and return its hooks.

    Raises `UnavailableError` naming the distribution, and `ConflictError` where it is one of two of its name.
    """
    require_unrivalled(plugin)
    where = f"cannot load {plugin}"
    try:
        module = contained(plugin.entry_point.load)
    except BrokenPluginError as broken:
        raise UnavailableError(where, str(broken), "install or repair that package") from broken.__cause__
    api = getattr(module, "SINDER_API", 1)  # what says nothing was written for the first
    if api != contract.SINDER_API:
        why = f"it is written for SINDER_API {api}, this is {contract.SINDER_API}"
        raise UnavailableError(where, why, f"install a version of {plugin.distribution} for this sinder")
    manager = pluggy.PluginManager(contract.PROJECT)
    manager.add_hookspecs(contract)
    try:
        manager.register(module, plugin.name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise UnavailableError(where, str(error)) from error
    return Hooks(plugin, manager.hook)


def hooks_for(model: str) -> Hooks:
    """The hooks of the plugin that a model name belongs to; of them only the listing has been called.

    Raises `UsageError` with near names if no plugin offers the model, `UnavailableError` if its plugin breaks or may
    not load, `ConflictError` if there are two of that plugin.
    """
    plugins = installed_plugins()
    allowed = allowed_plugins(plugins)
    plugin = owner_of(model, plugins)
    if plugin is None:
        raise unknown_model(model, _near_listings(model, allowed))
    if plugin.name not in allowed:
        raise UnavailableError(f"cannot load {plugin}", f"{ALLOWED} does not name it", f"add it to {ALLOWED}")
    hooks = load_plugin(plugin)
    listings = listings_of(plugin, hooks)
    if not _offers(model, listings):
        raise unknown_model(model, listings)
    return hooks


def _offers(model: str, listings: list[Listing]) -> bool:
    """Whether a model is listed; a plugin that lists nothing, or a name with a `/`, may take names it does not list."""
    names = [listing.name for listing in listings]
    return not names or model in names or any("/" in name for name in names)


def listings_of(plugin: PluginEntry, hooks: Hooks) -> list[Listing]:
    """What a plugin lists. Raises `UnavailableError` for a listing that fails or lists something else."""
    try:
        return contained(lambda: [_checked(row, plugin) for row in hooks.sinder_listing() or ()])
    except BrokenPluginError as broken:
        raise UnavailableError(f"cannot list {plugin}", str(broken), "tell its author") from broken.__cause__


def _checked(row: Any, plugin: PluginEntry) -> Listing:
    """A row of a listing, if it is one: its types are right and its name belongs to the plugin."""
    if not isinstance(row, Listing):
        raise TypeError(f"{row!r} is no Listing")
    listing = TypeAdapter(Listing).validate_python(asdict(row))
    if not _begins_with(listing.name, plugin.name):
        raise ValueError(f"model {listing.name!r} does not begin with {plugin.name!r}")
    return listing


def unknown_model(model: str, listings: list[Listing]) -> UsageError:
    """The error for a model that nobody offers, suggesting the nearest names of these listings."""
    return UsageError(f"unknown model {model!r}", "no installed plugin offers it", _hint(model, listings))


def _hint(model: str, listings: list[Listing]) -> str:
    """What may have been meant by a name that nobody offers."""
    names = [listing.name for listing in listings]
    if Path(model).is_dir():
        taking = [name.removesuffix(FOLDER) for name in names if name.endswith(FOLDER)]
        named = [f"; a model in a folder is named {prefix}/./{model}" for prefix in taking]
        return f"the folder is no run directory{''.join(named)}"
    if "://" in model:
        return "name an architecture, download the file, and give it with --weights"
    if model.lower().endswith(CHECKPOINT_ENDINGS):
        return "name an architecture that `sinder backbones` lists, and give the file with --weights"
    kind = "/OWNER/NAME" if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else "/NAME"
    taking = [name.removesuffix(kind[1:]) + model for name in names if re.fullmatch(rf"[^/]+{kind}", name)]
    if kind != "/NAME" and taking:
        return f"a repository is named {taking[0]}"
    plain = [name for name in names if ("/" in name) == ("/" in model)]
    near = difflib.get_close_matches(model.lower(), plain, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    others = f"; a name of another library takes its prefix, as in {taking[0]}" if taking and "/" not in model else ""
    return f"`sinder backbones` lists the models{others}"


def _near_listings(model: str, plugins: Mapping[str, PluginEntry]) -> list[Listing]:
    """What the built-in plugins list, and those whose name is nearly what the model's begins with, if they load."""
    near = difflib.get_close_matches(re.split("[_/]", model.lower())[0], list(plugins), cutoff=0.5)
    asked = [plugin for name, plugin in plugins.items() if name in near or _is_built_in(plugin)]
    return [row.listing for plugin in asked for row in _rows_of(plugin) if row.listing]


def installed_backbones() -> Iterator[InstalledBackbone]:
    """Every listed model of every plugin that may load; one that cannot be loaded gives a row with its problem.

    Raises `ConflictError` for two plugins of one name before any is imported.
    """
    plugins = allowed_plugins(installed_plugins())
    for plugin in plugins.values():
        require_unrivalled(plugin)
    for plugin in plugins.values():
        owner = owner_of(plugin.name, plugins)
        if owner is not None and owner != plugin and _is_built_in(owner):
            why = f"names that begin with {owner.name!r} belong to {owner}"
            yield InstalledBackbone(plugin, None, f"cannot use {plugin}: {why}; rename it")
            continue
        yield from _rows_of(plugin)


def _rows_of(plugin: PluginEntry) -> Iterator[InstalledBackbone]:
    try:
        listings = listings_of(plugin, load_plugin(plugin))
    except SinderError as error:
        yield InstalledBackbone(plugin, None, str(error))
        return
    for listing in listings:
        yield InstalledBackbone(plugin, listing)
