"""Command-line options that several subcommands share, and options generated from a settings model."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sinder_cli.backbone.device import AttentionName
from sinder_cli.backbone.hooks import ModelRequest
from sinder_cli.errors import UsageError
from sinder_cli.events import Emit

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from sinder_cli.defects.settings import PassSettings

OutputFormat = Literal["table", "json"]


def complete_model(incomplete: str) -> list[str]:
    """Return the names of models, and the folders, that begin so; nothing heavy is imported."""
    from sinder_cli.backbone.registry import installed_backbones

    names = [row.listing.name for row in installed_backbones() if row.listing]
    path = Path(incomplete)
    place, start = (path, "") if incomplete.endswith("/") else (path.parent, path.name)
    with suppress(OSError):
        folders = [each for each in sorted(place.iterdir()) if each.is_dir() and each.name.startswith(start)]
        names += [f"{each}/" for each in folders if start or not each.name.startswith(".")]
    return [name for name in names if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        autocompletion=complete_model,
        help="Name of a model, as `sinder backbones` lists them, or a run directory.",
    ),
]
WeightsFile = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="Checkpoint: .safetensors, .pth or .pt; default: the official one."),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a model from a hub."),
]
Branch = Annotated[
    str | None,
    typer.Option("--branch", metavar="NAME", help="Model to use if the file holds several, such as teacher."),
]
AdapterFile = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="FILE",
        help="adapter.safetensors of a repair of these weights, or a diff; it is applied to them.",
    ),
]
Heads = Annotated[
    int | None, typer.Option("--heads", min=1, help="Number of attention heads, if not the checkpoint's width / 64.")
]
Compare = Annotated[
    str | None,
    typer.Option(
        "--compare",
        metavar="MODEL|RUN",
        autocompletion=complete_model,
        help="A second model of the same shape, or a run.",
    ),
]
CompareSeveral = Annotated[
    list[str] | None,
    typer.Option(
        "--compare",
        metavar="MODEL|RUN",
        autocompletion=complete_model,
        help="A second model of the same shape, or a run; with photographs as plain arguments, any models; repeatable.",
    ),
]
CompareWeights = Annotated[
    Path | None, typer.Option("--compare-weights", metavar="FILE", help="Checkpoint of the second model.")
]
CompareAdapter = Annotated[
    Path | None, typer.Option("--compare-adapter", metavar="FILE", help="Adapter of the second model.")
]
CompareHeads = Annotated[
    int | None, typer.Option("--compare-heads", min=1, help="Attention heads of the second model.")
]
Attention = Annotated[AttentionName, typer.Option("--attention", help="Attention kernel.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="Folder, image, or list of images (.txt); repeatable; - reads a list from standard input.",
    ),
]
MoreData = Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help="More folders, images or lists.")]
Photographs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PATH]...",
        help="Photographs: up to eight are answered in five lines and a picture. Or more folders, images or lists.",
    ),
]
Format = Annotated[
    OutputFormat | None,
    typer.Option(
        "--format",
        help="Default: table on a terminal, else one JSON document; photographs alone are answered in words.",
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings as TOML; options override them.")
]


def model_request(
    model: str,
    weights: Path | None,
    adapter: Path | None,
    heads: int | None,
    emit: Emit,
    attention: AttentionName = "auto",
    revision: str | None = None,
    branch: str | None = None,
) -> ModelRequest:
    """Return the request for a model with the user's options."""
    return ModelRequest(model, weights, heads, attention, emit, adapter, revision, branch=branch)


Second = tuple[Path | None, Path | None, int | None]  # weights, adapter and heads of the second model


def one_compared(compare: list[str] | None) -> list[str]:
    """Return the model to compare with, if there is one. Raises `UsageError` for several."""
    if compare and len(compare) > 1:
        why = f"a report has two sides, and --compare names {len(compare)} more"
        remedy = "name up to 8 photographs, without --data or --out"
        raise UsageError("cannot compare with several models", why, remedy)
    return compare or []


def require_second(compared: list[str], second: Second) -> None:
    """Raise `UsageError` for options of a second model unless exactly one is named."""
    if any(second) and len(compared) != 1:
        why = "--compare-weights, --compare-adapter and --compare-heads need one"
        raise UsageError("no second model", why, "name it with --compare")


def with_settings(kind: type[PassSettings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's parameter `settings` by `--config` and one option per field of the settings model."""

    from sinder_cli.defects.settings import read_settings

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != "settings"]
        options = [_option(name, field) for name, field in kind.model_fields.items()]
        config = _keyword("config", ConfigFile)

        @functools.wraps(command)
        def wrapper(config: Path | None = None, **values: Any) -> None:
            given = {name: values.pop(name) for name in kind.model_fields}
            chosen = {name: value for name, value in given.items() if value is not None}
            command(**values, settings=read_settings(kind, chosen, config))

        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        wrapper.__signature__ = inspect.Signature([*parameters, *options, config])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in (*parameters, *options, config)}
        return wrapper

    return decorate


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    default = "" if field.default in (None, ()) or field.default is False else f" (default: {field.default})"
    dashed = name.replace("_", "-")
    flag = f"--{dashed}/--no-{dashed}" if field.default is True else f"--{dashed}"
    repeatable = typing.get_origin(field.annotation) is tuple
    kind = typing.get_args(field.annotation)[0] if repeatable else field.annotation
    parsed: Any = list[_parsed_type(kind)] if repeatable else _parsed_type(kind)  # type: ignore[misc]
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    metavar = "|".join(map(str, choices)) or None
    complete = _completing(choices) if choices else None
    option = typer.Option(
        flag, help=f"{field.description}{default}", metavar=metavar, show_default=False, autocompletion=complete
    )
    return _keyword(name, Annotated[parsed | None, option])


def _completing(choices: tuple[Any, ...]) -> Callable[[str], list[str]]:
    """Return what completes one of these values; the parser takes plain functions alone."""

    def complete(incomplete: str) -> list[str]:
        return [str(choice) for choice in choices if str(choice).startswith(incomplete)]

    return complete


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parsed_type(annotation: Any) -> Any:
    """Return the type that the command line parses; the settings model checks the values and parses complex ones."""
    if typing.get_origin(annotation) is Literal:
        return type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        return _parsed_type(parts[0]) if len(parts) == 1 else str
    return annotation if isinstance(annotation, type) else str
