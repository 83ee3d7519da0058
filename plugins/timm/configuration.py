"""The `config.json` that timm's hub expects beside the weights of a model."""

from __future__ import annotations

import json
from typing import Any

HELD = (
    "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "pool_size",
    "first_conv", "classifier", "license",
)  # fmt: skip


def hub_config(name: str, module: Any) -> str:
    """The text of `config.json` for a model by its name, built without a classifier."""
    architecture, _, tag = name.partition(".")
    cfg = {key: module.pretrained_cfg[key] for key in HELD if module.pretrained_cfg.get(key) is not None}
    cfg |= {"tag": tag, "custom_load": False, "num_classes": 0}
    document = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": module.num_features,
        "global_pool": module.global_pool,
        "pretrained_cfg": cfg,
    }
    return json.dumps(document, indent=2) + "\n"
