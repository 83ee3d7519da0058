"""sinder: predict, show and repair the singular defects of pre-trained Vision Transformers.

This module is what the author of a backbone plugin imports, and nothing else. A plugin is a module that an entry point
of the group `sinder.backbones` names. It says `SINDER_API = 1`, the version of this contract that it is written for,
and has up to three functions, each marked with `hookimpl`:

    sinder_listing() -> Sequence[Listing]                   the models it offers; must not import torch
    sinder_weights(request) -> Path | TensorSource | None   their weights, where the user names no file; may be left out
    sinder_backbone(request, weights) -> Backbone           the layer map, and the functions that run the model

`request` is a `ModelRequest`, `weights` a `Weights`. Any `SinderError` that they raise ends the command with its line
and exit code; any other exception is told as a failure of the plugin. The README shows a whole plugin, and
`sinder check-backbone` runs one through all that the engine relies on.
"""

from sinder_cli.backbone.attention import attention_kernel
from sinder_cli.backbone.contract import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SINDER_API,
    AttentionMap,
    Backbone,
    BlockMap,
    GatedMlpMap,
    LayerMap,
    Listing,
    ModelRequest,
    NormMap,
    PlainMlpMap,
    PositionMap,
    StemMap,
    WeightRef,
    hookimpl,
)
from sinder_cli.backbone.download import download
from sinder_cli.backbone.opening import require_matching
from sinder_cli.backbone.sources import (
    MemoryTensors,
    TensorInfo,
    TensorSource,
    open_checkpoint,
    shard_names,
    weights_in,
)
from sinder_cli.backbone.torchvision_shim import define_torchvision_operators
from sinder_cli.backbone.weights import Weights
from sinder_cli.errors import BadInputError, NoInputError, SinderError, UnavailableError, UsageError

__version__ = "0.1.0"

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SINDER_API",
    "AttentionMap",
    "Backbone",
    "BadInputError",
    "BlockMap",
    "GatedMlpMap",
    "LayerMap",
    "Listing",
    "MemoryTensors",
    "ModelRequest",
    "NoInputError",
    "NormMap",
    "PlainMlpMap",
    "PositionMap",
    "SinderError",
    "StemMap",
    "TensorInfo",
    "TensorSource",
    "UnavailableError",
    "UsageError",
    "WeightRef",
    "Weights",
    "attention_kernel",
    "define_torchvision_operators",
    "download",
    "hookimpl",
    "open_checkpoint",
    "require_matching",
    "shard_names",
    "weights_in",
]
