"""The records that pass between a plugin and the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinder_cli.backbone.attention import AttentionName
from sinder_cli.backbone.layermap import LayerMap
from sinder_cli.backbone.weights import Weights
from sinder_cli.events import Emit, silent

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Listing:
    """One line of `sinder backbones`: a model name that a plugin offers, and what is known without its weights.

    `requires` names the modules that the model needs beyond sinder's own dependencies, such as `timm`;
    `revisions` tells that it comes from a hub where `--revision` means something.
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
    """What the user said about the model: its name, and options that a plugin may need to describe it.

    `weights` is the file that the user named, if any; the engine opens it. `heads` is the number of attention heads,
    where nothing else tells it. `attention` is for `attention_kernel`, and `emit` for `download`. `adapter` is no
    plugin's business.
    `branch` tells which of several backbones in the file is meant; `Weights.located` heeds it.
    `revision` is that of a repository on a hub. `sidecars` are those of the backbone that a run repaired, by name;
    where there are any, they stand for the files of the folder or repository that the name means, which may be gone.
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


@dataclass(frozen=True)
class Backbone:
    """A Vision Transformer as a plugin describes it: embed → blocks → norm, with its layer map.

    `layers` names tensors of `weights`, which are those that the plugin was given, perhaps `located` or `renamed`.
    The functions are called with gradients on or off, on any device, for any batch size and any image of whole patches,
    at least 5 × 5 of them; they write into none of their arguments.

    `embed(module, images)` takes normalized images `[B, 3, H, W]` and returns the tokens `[B, prefix + patches, N]`
    (patches row by row) and a context that every block may need, shared by all images of the batch, or None.
    `run_block(module, index, tokens, context)` runs one block on the residual stream.
    `finish(module, tokens)` applies the final norm.
    `build()` makes the module, in any initialization; its state dict has exactly the names of `weights`.
    `forward(module, images)` is the library's own way from images to the normalized tokens `[B, prefix + patches, N]`;
    nothing but `sinder check-backbone` calls it, to compare `embed`, `run_block` and `finish` with it.
    `sidecars` are small text files, by name, that describing the backbone again takes beside its weights, such as the
    `config.json` of a Hugging Face folder; a run directory keeps them.
    `hub_source()` gives Python files, by name, of a package that needs nothing but torch, for an export to `torch.hub`:
    `build()` of its `model.py` makes the module, whose `forward(images)` returns tokens after the final norm.
    """

    name: str
    layers: LayerMap
    weights: Weights
    patch_size: int
    prefix_tokens: int  # cls and registers, cls first
    has_cls: bool
    image_size: int  # pixels; the default side of a square input
    build: Callable[[], nn.Module]
    embed: Callable[[Any, Tensor], tuple[Tensor, Any]]  # the first argument is what `build` made
    run_block: Callable[[Any, int, Tensor, Any], Tensor]
    finish: Callable[[Any, Tensor], Tensor]
    forward: Callable[[Any, Tensor], Tensor] | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    sample_images: Callable[[int, int], list[Image]] | None = None  # (count, seed); for models that bring their data
    sidecars: Mapping[str, str] = field(default_factory=dict)
    hub_source: Callable[[], Mapping[str, str]] | None = None
    license: str | None = None  # of the weights, as model cards name it, where it is known: `apache-2.0`

    @property
    def depth(self) -> int:
        return len(self.layers.blocks)

    @property
    def width(self) -> int:
        return self.layers.width
