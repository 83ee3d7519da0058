"""The three hooks of a backbone plugin. Its entry point is in the group `sinder.backbones`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pluggy

from sinder_cli.backbone.describe import Backbone, Listing, ModelRequest
from sinder_cli.backbone.sources import TensorSource
from sinder_cli.backbone.weights import Weights

PROJECT = "sinder"
ENTRY_POINT_GROUP = "sinder.backbones"
SINDER_API = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def sinder_listing() -> Sequence[Listing]:
    """List the model names that this plugin offers, without importing torch.

    Any other name is refused before the next hook is called, unless a listed one has a `/` in it, as
    `hf/OWNER/NAME` has: that stands for more names than can be listed.
    """
    raise AssertionError


@hookspec(firstresult=True)
def sinder_weights(request: ModelRequest) -> Path | TensorSource | None:
    """Find, download or make the weights of `request.model` when the user named no file."""
    raise AssertionError


@hookspec(firstresult=True)
def sinder_backbone(request: ModelRequest, weights: Weights) -> Backbone:
    """Describe `request.model` as these weights hold it."""
    raise AssertionError
