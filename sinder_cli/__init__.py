"""sinder: predict, show and repair the singular defects of pre-trained Vision Transformers.

This module is what a Python program imports, and what the author of a backbone plugin does, and nothing else.

`predict_defects`, `analyze`, `look`, `repair`, `evaluate` and `export` are the commands as functions: docs/python.md
shows them, `api.py` documents them. `sinder_cli.tasks` is what the author of a task imports.

A plugin is a module that an entry point of the group `sinder.backbones` names. It says `SINDER_API = 1`, the version of
this contract that it is written for, and has up to three functions, each marked with `hookimpl`:

    sinder_listing() -> Sequence[Listing]                   the models it offers; must not import torch
    sinder_weights(request) -> Path | TensorSource | None   their weights, where the user names no file; may be left out
    sinder_backbone(request, weights) -> Backbone           the layer map, and the functions that run the model

`request` is a `ModelRequest`, `weights` a `Weights`. Any `SinderError` that they raise ends the command with its line
and exit code; any other exception is reported as a failure of the plugin. docs/plugins.md shows a whole plugin, and
`sinder check-backbone` runs one through all that the engine relies on.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sinder_cli.api import (
        AnalyzeRequest,
        AnalyzeSettings,
        EvaluateRequest,
        EvaluateSettings,
        ExportRequest,
        ExportSettings,
        PredictRequest,
        RepairRequest,
        RepairSettings,
        analyze,
        evaluate,
        export,
        look,
        predict_defects,
        repair,
    )
    from sinder_cli.backbone.contract import (
        IMAGENET_MEAN,
        IMAGENET_STD,
        AttentionMap,
        Backbone,
        BlockMap,
        GatedMlpMap,
        LayerMap,
        NormMap,
        PlainMlpMap,
        PositionMap,
        StemMap,
        WeightRef,
    )
    from sinder_cli.backbone.device import attention_kernel
    from sinder_cli.backbone.download import download
    from sinder_cli.backbone.hooks import SINDER_API, Listing, ModelRequest, hookimpl
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
    from sinder_cli.errors import (
        BadInputError,
        CannotCreateError,
        ConflictError,
        NoInputError,
        SinderError,
        StorageError,
        TryAgainError,
        UnavailableError,
        UsageError,
    )

__version__ = "0.1.0"

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SINDER_API",
    "AnalyzeRequest",
    "AnalyzeSettings",
    "AttentionMap",
    "Backbone",
    "BadInputError",
    "BlockMap",
    "CannotCreateError",
    "ConflictError",
    "EvaluateRequest",
    "EvaluateSettings",
    "ExportRequest",
    "ExportSettings",
    "GatedMlpMap",
    "LayerMap",
    "Listing",
    "MemoryTensors",
    "ModelRequest",
    "NoInputError",
    "NormMap",
    "PlainMlpMap",
    "PositionMap",
    "PredictRequest",
    "RepairRequest",
    "RepairSettings",
    "SinderError",
    "StemMap",
    "StorageError",
    "TensorInfo",
    "TensorSource",
    "TryAgainError",
    "UnavailableError",
    "UsageError",
    "WeightRef",
    "Weights",
    "analyze",
    "attention_kernel",
    "define_torchvision_operators",
    "download",
    "evaluate",
    "export",
    "hookimpl",
    "look",
    "open_checkpoint",
    "predict_defects",
    "repair",
    "require_matching",
    "shard_names",
    "weights_in",
]

_NAMES_BY_MODULE = {
    "backbone.contract": "IMAGENET_MEAN IMAGENET_STD AttentionMap Backbone BlockMap GatedMlpMap LayerMap NormMap "
    "PlainMlpMap PositionMap StemMap WeightRef",
    "backbone.hooks": "SINDER_API Listing ModelRequest hookimpl",
    "backbone.device": "attention_kernel",
    "backbone.download": "download",
    "backbone.opening": "require_matching",
    "backbone.sources": "MemoryTensors TensorInfo TensorSource open_checkpoint shard_names weights_in",
    "backbone.torchvision_shim": "define_torchvision_operators",
    "backbone.weights": "Weights",
    "errors": "BadInputError CannotCreateError ConflictError NoInputError SinderError StorageError TryAgainError "
    "UnavailableError UsageError",
    "api": "AnalyzeRequest AnalyzeSettings EvaluateRequest EvaluateSettings ExportRequest ExportSettings "
    "PredictRequest RepairRequest RepairSettings analyze evaluate export look predict_defects repair",
}
_MODULE_OF = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Import what is first used: `sinder --help` needs nothing of it, and a plugin not all."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"sinder_cli.{_MODULE_OF[name]}"), name)
    return found
