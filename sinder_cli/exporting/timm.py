"""Target `timm`: a folder that timm loads as one from a hub, with timm's names and a `config.json` to build from.

A model made by timm keeps its names. Any other becomes a timm `VisionTransformer`: one of timm's registered DINOv2
models, with the sizes given by the configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.storing import METADATA, write_safetensors
from sinder_cli.backbone.weights import Weights
from sinder_cli.errors import BadInputError
from sinder_cli.events import Warned
from sinder_cli.exporting.conversion import ConvertedTensors
from sinder_cli.exporting.layouts import Architecture, Layout, architecture_of, recipes
from sinder_cli.exporting.targets import CARD_OPTIONS, ExportCheck, ExportTarget, Loading, Plan
from sinder_cli.exporting.verifying import all_tokens, verify_features
from sinder_cli.files import write_json

if TYPE_CHECKING:
    pass

CONFIG, WEIGHTS = "config.json", "model.safetensors"
EPS = 1e-6  # of timm's ViT; a smaller one in another library makes a small difference, which the check measures
PLAIN, GATED = "vit_base_patch14_dinov2", "vit_giant_patch14_dinov2"  # GELU, and SiLU gates
KNOWN = {384: "vit_small_patch14_dinov2", 768: PLAIN, 1024: "vit_large_patch14_dinov2", 1536: GATED}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu", "relu": "relu"}

LAYOUT = Layout(
    cls="cls_token",
    position="pos_embed",
    registers="reg_token",
    patch="patch_embed.proj",
    norm="norm",
    block="blocks.{}.",
    norm1="norm1",
    query="attn.qkv",
    key="attn.qkv",
    value="attn.qkv",
    output="attn.proj",
    scale1="ls1.gamma",
    norm2="norm2",
    gate="mlp.fc1",
    up="mlp.fc1",
    down="mlp.fc2",
    scale2="ls2.gamma",
    required=frozenset({"scale", "output_bias", "up_bias", "down_bias"}),
)


@dataclass(frozen=True)
class TimmModel:
    """A backbone as a timm model."""

    config: Mapping[str, Any]
    weights: Weights


def converted(backbone: Backbone) -> TimmModel:
    """Return a `VisionTransformer` of timm. Raises `BadInputError` with the reason if none holds the backbone."""
    refuse = partial(_refuse, backbone)
    architecture = architecture_of(backbone, "timm")
    if architecture.has_stem_norm:
        refuse("it has a norm before its first block")
    if architecture.activation not in ACTIVATIONS or (architecture.gated and architecture.activation != "silu"):
        refuse(f"no such model has the activation {architecture.activation}")
    if architecture.eps > EPS:
        refuse(f"its norms have eps {architecture.eps}, and timm's {EPS}")
    # with registers, cls absorbs its own position: timm's models of that kind have none for cls and registers
    apart = architecture.registers > 0
    layout = replace(LAYOUT, position_prefix=0 if apart else 1)
    dtype = backbone.weights.info(backbone.weights.names[0]).dtype
    source = ConvertedTensors(backbone.weights, recipes(layout, backbone, architecture), dtype)
    arguments = _arguments(architecture, apart)
    return TimmModel(_config(backbone, architecture, arguments), Weights.of(source))


def _arguments(architecture: Architecture, apart: bool) -> dict[str, Any]:
    """Return the arguments of the function that builds the model."""
    hidden = architecture.hidden * (2 if architecture.gated else 1)  # timm counts both branches
    return {
        "act_layer": ACTIVATIONS[architecture.activation],
        "depth": architecture.depth,
        "embed_dim": architecture.width,
        "img_size": architecture.image_size,
        "init_values": 1e-5,
        "mlp_ratio": _ratio(hidden, architecture.width),
        "no_embed_class": apart,
        "num_heads": architecture.heads,
        "patch_size": architecture.patch,
        "qkv_bias": "attention.value_bias" in architecture.biases,
        "reg_tokens": architecture.registers,
    }


def _ratio(hidden: int, width: int) -> float:
    """Return a number that gives the hidden width when it is multiplied by the width and cut to an integer."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _config(backbone: Backbone, architecture: Architecture, arguments: dict[str, Any]) -> dict[str, Any]:
    known = KNOWN.get(architecture.width, PLAIN)
    name = GATED if architecture.gated else PLAIN if known == GATED else known
    side = architecture.image_size
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": architecture.width,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "sinder",
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **({"license": backbone.license} if backbone.license else {}),
        },
    }


def _refuse(backbone: Backbone, why: str) -> NoReturn:
    raise BadInputError(f"cannot export {backbone.name} to timm", why, "use --to native")


def own(backbone: Backbone) -> TimmModel | None:
    """Return a model made by timm as it is; None for any other backbone."""
    text = backbone.sidecars.get(CONFIG)
    config = json.loads(text) if text else {}
    return TimmModel(config, backbone.weights) if "architecture" in config else None


def _require(plan: Plan) -> None:
    if own(plan.backbone) is None:
        converted(plan.backbone)
        eps = architecture_of(plan.backbone, "timm").eps
        if eps != EPS:
            plan.emit(Warned(f"timm's norms have eps {EPS}, this model's {eps}: features differ in their last digits"))


def _write(plan: Plan, path: Path) -> None:
    made = own(plan.backbone) or converted(plan.backbone)
    path.mkdir(exist_ok=True)
    write_json(path / CONFIG, made.config)
    tensors = (tensor for _, tensor in made.weights.stream(made.weights.names))
    write_safetensors(path / WEIGHTS, made.weights.output_infos(), tensors, METADATA)  # timm expects a single file


def _verify(plan: Plan, path: Path) -> ExportCheck:
    return verify_features(plan, path, "load_timm.py", ("timm",), all_tokens)


def _loading(_: Plan, place: str) -> Loading:
    name = f"local-dir:{place}"
    return Loading("import timm", f"model = timm.create_model({name!r}, pretrained=True, num_classes=0)")


TARGET = ExportTarget(
    kind="folder",
    summary="a folder for `timm.create_model('local-dir:…')`, ready for a hub",
    write=_write,
    verify=_verify,
    loading=_loading,
    require=_require,
    options=frozenset({"--dtype"}) | CARD_OPTIONS,
)
