"""The hooks that a plugin implements, and what is known of a model before its weights are read.

`sinder backbones` and the completion of a model's name load this much of the contract, and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

from sinder_cli.events import Emit, silent

if TYPE_CHECKING:
    from sinder_cli.backbone.contract import Backbone
    from sinder_cli.backbone.device import AttentionName
    from sinder_cli.backbone.sources import TensorSource
    from sinder_cli.backbone.weights import Weights


@dataclass(frozen=True)
class Listing:
    """One line of `sinder backbones`: a model name that a plugin offers, and facts known without its weights.

    `requires` names the modules that the model needs beyond sinder's own dependencies, such as `timm`;
    `revisions` is True if the model comes from a hub, so that `--revision` can be used.
    """

    name: str
    summary: str
    parameters: int | None = None
    patch_size: int | None = None
    prefix_tokens: int | None = None
    requires: tuple[str, ...] = ()
    revisions: bool = False


@dataclass(frozen=True)
class ModelRequest:
    """Request for a model: its name, and the user's options that a plugin may need to describe it.

    `weights` is the file that the user named, if any; the engine opens it. `heads` is the number of attention heads,
    for models that do not determine it otherwise. `attention` is for `attention_kernel`, and `emit` for `download`.
    Plugins ignore `adapter`.
    `branch` selects one of several backbones in the file; `Weights.located` applies it.
    `revision` is that of a repository on a hub. `sidecars` are those of the backbone that a run repaired, by name; if
    there are any, they replace the files of the named folder or repository, which may no longer exist.
    """

    model: str
    weights: Path | None = None
    heads: int | None = None
    attention: AttentionName = "auto"
    emit: Emit = silent
    adapter: Path | None = None
    revision: str | None = None
    sidecars: Mapping[str, str] = field(default_factory=dict)
    branch: str | None = None


PROJECT = "sinder"
ENTRY_POINT_GROUP = "sinder.backbones"
TASK_GROUP = "sinder.tasks"  # of the tasks of `sinder evaluate`
SINDER_API = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def sinder_listing() -> Sequence[Listing]:
    """List the model names that this plugin offers, without importing torch.

    Other names are refused before the next hook is called, unless a listed name contains a `/`, such as
    `hf/OWNER/NAME`: it stands for more names than can be listed.
    """
    raise AssertionError


@hookspec(firstresult=True)
def sinder_weights(request: ModelRequest) -> Path | TensorSource | None:
    """Find, download or make the weights of `request.model` when the user named no file."""
    raise AssertionError


@hookspec(firstresult=True)
def sinder_backbone(request: ModelRequest, weights: Weights) -> Backbone:
    """Describe `request.model` with the sizes and parts that these weights have."""
    raise AssertionError
