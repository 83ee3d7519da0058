"""Search for plugins: entry points are listed without being loaded, and only the named one is imported."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pluggy

from sinder_cli.backbone import hooks
from sinder_cli.backbone.hooks import Listing
from sinder_cli.backbone.isolation import BrokenPluginError, Hooks, PluginEntry, contained
from sinder_cli.errors import ConflictError, SinderError, UnavailableError, UsageError
from sinder_cli.events import Emit, Warned, silent

OWN_DISTRIBUTION = "sinder-cli"  # its plugins are the built-in ones
FOLDER = "/./FOLDER"  # ends a listed name of a plugin that accepts folders
CHECKPOINT_ENDINGS = (".pth", ".pt", ".safetensors", ".bin", ".ckpt", ".tar", ".npz", ".onnx")
LIBRARIES = ("timm", "transformers", "xformers")  # distributions whose code may run a model
ALLOWED = "SINDER_PLUGINS"  # environment variable: names of the plugins that may load, separated by commas


@dataclass(frozen=True)
class InstalledBackbone:
    """One row of `sinder backbones`: a listing, or the reason why its plugin could not be loaded."""

    plugin: PluginEntry
    listing: Listing | None
    problem: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """The required modules that are not installed, found without importing any of them."""
        return tuple(name for name in self.listing.requires if not _is_there(name)) if self.listing else ()


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (Exception, SystemExit):  # the parent package is missing, has no spec, or fails
        return False


def installed_plugins(group: str = hooks.ENTRY_POINT_GROUP) -> dict[str, PluginEntry]:
    """Return every plugin by name without importing any; of several with one name, the first has the rest as rivals."""
    found: dict[str, PluginEntry] = {}
    for entry in sorted(entry_points(group=group), key=lambda e: e.name):
        distribution = entry.dist.name if entry.dist else "unknown"
        known = found.get(entry.name)
        if known is None:
            found[entry.name] = PluginEntry(entry.name, distribution, entry)
        elif (known.distribution, known.entry_point.value) != (distribution, entry.value):
            found[entry.name] = replace(known, rivals=(*known.rivals, distribution))
    return found


def allowed_plugins(plugins: Mapping[str, PluginEntry]) -> dict[str, PluginEntry]:
    """Return the plugins named in `SINDER_PLUGINS`, or all if it is unset. Raises `UsageError` for an unknown name."""
    named = allowed_names()
    tasks = [entry.name for entry in entry_points(group=hooks.TASK_GROUP)]
    if unknown := [name for name in named if name not in plugins and name not in tasks]:
        why = f"no plugin {unknown[0]!r} is installed"
        raise UsageError(f"{ALLOWED} names an unknown plugin", why, f"there are {', '.join(plugins)}")
    return {name: plugin for name, plugin in plugins.items() if not named or name in named}


def plugin_versions() -> dict[str, str]:
    """Return the versions of all distributions that offer backbones, and of the libraries that run models for them."""
    entries = entry_points(group=hooks.ENTRY_POINT_GROUP)
    offering = {entry.dist.name: entry.dist.version for entry in entries if entry.dist}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            offering[name] = version(name)
    return dict(sorted(offering.items()))


def allowed_names() -> list[str]:
    """Return the names in `SINDER_PLUGINS`; none if all plugins may load."""
    return [name.strip() for name in os.environ.get(ALLOWED, "").split(",") if name.strip()]


def owner_of(model: str, plugins: Mapping[str, PluginEntry]) -> PluginEntry | None:
    """Return the plugin whose name begins the model name: `dinov2_vitg14` → dinov2, `hf/…` → hf; None if there is none.

    A built-in plugin owns all names that begin with its own: another distribution's plugin `demo_vit` cannot take
    models from `demo`. Among other plugins the longest name owns the model.
    """
    owners = [name for name in plugins if _begins_with(model, name)]
    built_in = [name for name in owners if is_built_in(plugins[name])]
    return plugins[max(built_in or owners, key=len)] if owners else None


def _begins_with(model: str, plugin: str) -> bool:
    return re.match(rf"{re.escape(plugin)}($|[_/])", model) is not None


def is_built_in(plugin: PluginEntry) -> bool:
    """Return whether a plugin comes with sinder itself."""
    return OWN_DISTRIBUTION in (plugin.distribution, *plugin.rivals)


def require_unrivalled(plugin: PluginEntry) -> None:
    """Raise `ConflictError` for a plugin if another distribution provides one of the same name."""
    if plugin.rivals:
        providers = " and ".join(sorted({plugin.distribution, *plugin.rivals}))
        why = f"provided by {providers}"
        raise ConflictError(f"two plugins are called {plugin.name!r}", why, "uninstall one of them")


def load_plugin(plugin: PluginEntry) -> Hooks:
    """Import one backbone plugin and return its hooks. Raises the errors of `hooks_of`."""
    return Hooks(plugin, hooks_of(plugin, hooks))


def hooks_of(plugin: PluginEntry, specifications: Any) -> Any:
    """Import one plugin and return what calls its hooks, as the module `specifications` specifies them.

    Raises `UnavailableError`, which names the distribution, and `ConflictError` if another plugin has the same name.
    """
    require_unrivalled(plugin)
    where = f"cannot load {plugin}"
    try:
        module = contained(plugin.entry_point.load)
    except BrokenPluginError as broken:
        raise UnavailableError(where, str(broken), "install or repair that package") from broken.__cause__
    api = getattr(module, "SINDER_API", 1)  # a plugin without it was written for the first version
    if api != hooks.SINDER_API:
        why = f"it is written for SINDER_API {api}, this is {hooks.SINDER_API}"
        raise UnavailableError(where, why, f"install a version of {plugin.distribution} for this sinder")
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(specifications)
    try:
        manager.register(module, plugin.name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise UnavailableError(where, str(error)) from error
    return manager.hook


def hooks_for(model: str) -> Hooks:
    """Return the hooks of the plugin that owns a model name; only its listing has been called.

    Raises `UsageError` with similar names if no plugin offers the model, `UnavailableError` if its plugin breaks or may
    not load, `ConflictError` if two plugins have its name.
    """
    plugins = installed_plugins()
    allowed = allowed_plugins(plugins)
    plugin = owner_of(model, plugins)
    if plugin is None:
        raise unknown_model(model, _near_listings(model, allowed))
    if plugin.name not in allowed:
        raise UnavailableError(f"cannot load {plugin}", f"{ALLOWED} does not name it", f"add it to {ALLOWED}")
    loaded = load_plugin(plugin)
    listings = listings_of(plugin, loaded)
    if not _offers(model, listings):
        raise unknown_model(model, listings)
    return loaded


def _offers(model: str, listings: list[Listing]) -> bool:
    """Return True if a model is listed, or if its plugin may take unlisted names: it lists none, or one with a `/`."""
    names = [listing.name for listing in listings]
    return not names or model in names or any("/" in name for name in names)


def listings_of(plugin: PluginEntry, loaded: Hooks) -> list[Listing]:
    """Return the listing of a plugin. Raises `UnavailableError` if it fails or has invalid rows."""
    try:
        return contained(lambda: [_checked(row, plugin) for row in loaded.sinder_listing() or ()])
    except BrokenPluginError as broken:
        raise UnavailableError(f"cannot list {plugin}", str(broken), "tell its author") from broken.__cause__


def _checked(row: Any, plugin: PluginEntry) -> Listing:
    """Return a row of a listing. Raises an error unless its types are right and its name belongs to the plugin."""
    if not isinstance(row, Listing):
        raise TypeError(f"{row!r} is no Listing")
    listing = row if _has_its_types(row) else _converted(row)
    if not _begins_with(listing.name, plugin.name):
        raise ValueError(f"model {listing.name!r} does not begin with {plugin.name!r}")
    return listing


def _has_its_types(row: Listing) -> bool:
    """Return True if all values are of the declared types, so that nothing need be converted or complained of."""
    sizes = (row.parameters, row.patch_size, row.prefix_tokens)
    texts = (row.name, row.summary, *(row.requires if isinstance(row.requires, tuple) else (None,)))
    return (
        isinstance(row.revisions, bool)
        and all(isinstance(text, str) for text in texts)
        and all(size is None or isinstance(size, int) for size in sizes)
    )


def _converted(row: Listing) -> Listing:
    """Return a row with its values converted where that loses nothing. Raises pydantic's error for others."""
    from pydantic import TypeAdapter  # not loaded for rows that are right, which a shell's completion waits for

    return TypeAdapter(Listing).validate_python(asdict(row))


def unknown_model(model: str, listings: list[Listing]) -> UsageError:
    """Return the error for a model that no plugin offers; it suggests the most similar names of these listings."""
    return UsageError(f"unknown model {model!r}", "no installed plugin offers it", _hint(model, listings))


def _hint(model: str, listings: list[Listing]) -> str:
    """Return advice for an unknown model name: what the user may have meant."""
    names = [listing.name for listing in listings]
    if Path(model).is_dir():
        taking = [name.removesuffix(FOLDER) for name in names if name.endswith(FOLDER)]
        named = [f"; a model in a folder is named {prefix}/./{model}" for prefix in taking]
        return f"the folder is no run directory{''.join(named)}"
    if "://" in model:
        return "name an architecture, download the file, and give it with --weights"
    if model.lower().endswith(CHECKPOINT_ENDINGS):
        return "name an architecture that `sinder backbones` lists, and give the file with --weights"
    if names_file(model):
        return f"this is a file: the model comes first, as in `sinder analyze dinov2_vits14 {model}`"
    kind = "/OWNER/NAME" if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else "/NAME"
    taking = [name.removesuffix(kind[1:]) + model for name in names if re.fullmatch(rf"[^/]+{kind}", name)]
    if kind != "/NAME" and taking:
        return f"a repository is named {taking[0]}"
    plain = [name for name in names if ("/" in name) == ("/" in model)]
    near = difflib.get_close_matches(model.lower(), plain, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    others = f"; a model of another library needs a prefix, as in {taking[0]}" if taking and "/" not in model else ""
    return f"`sinder backbones` lists the models{others}"


def names_file(name: str) -> bool:
    """Return True if a name is that of a file, which may stand in the place of a model by mistake."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def _near_listings(model: str, plugins: Mapping[str, PluginEntry]) -> list[Listing]:
    """Return the listings of built-in plugins, and of those named like the start of the model's name, if they load."""
    near = difflib.get_close_matches(re.split("[_/]", model.lower())[0], list(plugins), cutoff=0.5)
    asked = [plugin for name, plugin in plugins.items() if name in near or is_built_in(plugin)]
    return [row.listing for plugin in asked for row in _rows_of(plugin) if row.listing]


def installed_backbones() -> Iterator[InstalledBackbone]:
    """Yield every listed model of every plugin that may load; a plugin that fails to load gives a row with its problem.

    Raises `ConflictError` for two plugins of the same name before any is imported.
    """
    plugins = allowed_plugins(installed_plugins())
    for plugin in plugins.values():
        require_unrivalled(plugin)
    for plugin in plugins.values():
        owner = owner_of(plugin.name, plugins)
        if owner is not None and owner != plugin and is_built_in(owner):
            why = f"names that begin with {owner.name!r} belong to {owner}"
            yield InstalledBackbone(plugin, None, f"cannot use {plugin}: {why}; rename it")
            continue
        yield from _rows_of(plugin)


def backbones(emit: Emit = silent) -> list[InstalledBackbone]:
    """Return every model of every installed plugin; a plugin that cannot be loaded is warned of."""
    rows = list(installed_backbones())
    for row in rows:
        if row.problem:
            emit(Warned(row.problem))
    return rows


def _rows_of(plugin: PluginEntry) -> Iterator[InstalledBackbone]:
    try:
        listings = listings_of(plugin, load_plugin(plugin))
    except SinderError as error:
        yield InstalledBackbone(plugin, None, str(error))
        return
    for listing in listings:
        yield InstalledBackbone(plugin, listing)
