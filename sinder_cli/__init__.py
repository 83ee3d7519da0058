"""sinder: predict, show and repair the singular defects of pre-trained Vision Transformers.

This module is what the author of a backbone plugin imports, and nothing else.
"""

from sinder_cli.backbone.attention import attention_kernel
from sinder_cli.backbone.describe import IMAGENET_MEAN, IMAGENET_STD, Backbone, Listing, ModelRequest
from sinder_cli.backbone.download import download
from sinder_cli.backbone.hookspecs import SINDER_API, hookimpl
from sinder_cli.backbone.layermap import (
    AttentionMap,
    BlockMap,
    GatedMlpMap,
    LayerMap,
    NormMap,
    PlainMlpMap,
    PositionMap,
    StemMap,
    WeightRef,
)
from sinder_cli.backbone.opening import require_matching
from sinder_cli.backbone.shards import shard_names, weights_in
from sinder_cli.backbone.sources import MemoryTensors, TensorInfo, TensorSource, open_checkpoint
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
    "download",
    "hookimpl",
    "open_checkpoint",
    "require_matching",
    "shard_names",
    "weights_in",
]
