"""Configuration of an encoder: the values of `config.json`, completed by its family's defaults."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sinder_cli import BadInputError

from .families import FAMILIES, Family

# The library's activations by the names that the layer map has; several of its names mean the same function.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "leaky_relu": "leaky_relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}


@dataclass(frozen=True)
class Parts:
    """The optional parts of an encoder: `Switches` with their values; None means that the checkpoint decides."""

    query_bias: bool
    key_bias: bool
    value_bias: bool
    output_bias: bool
    mlp_bias: bool
    scales: bool
    gated: bool
    mask: bool | None
    position: bool
    table: bool
    shared_table: bool
    norm: bool


@dataclass(frozen=True)
class Config:
    """The sizes of one encoder, and the table of `config.json` that describes it."""

    family: Family
    raw: Mapping[str, Any]
    width: int
    depth: int
    heads: int
    hidden: int
    activation: str
    eps: float
    patch: int
    grid: int  # patches per side at the native size
    registers: int
    parts: Parts

    @property
    def prefix_tokens(self) -> int:
        return self.family.prefix + self.registers

    @property
    def image_size(self) -> int:
        return self.grid * self.patch


def read_config(text: str, place: str) -> Config:
    """Return the configuration of the encoder in a `config.json`, or of the vision tower inside it.

    Raises `BadInputError` if it needs code of its own, for a family that is unknown or cannot be described by a layer
    map, and for invalid sizes. `place` is named in errors.
    """
    whole = read_table(text, f"{place}/config.json")
    if "auto_map" in whole:
        why = "its config.json asks for code of its own (auto_map), and code of a checkpoint is never run"
        raise _bad(place, why, "use a model that transformers itself has")
    raw = _tower(whole)
    family = _family(raw, place)
    given = _Given({**family.defaults, **raw}, place)
    width, heads, patch = given.size("hidden_size"), given.size("num_attention_heads"), given.side("patch_size")
    if width % heads:
        raise _bad(place, f"hidden_size {width} is no multiple of num_attention_heads {heads}")
    if given.size("num_channels", 3) != 3:
        raise _bad(place, f"it takes images of {given.size('num_channels')} channels, not 3")
    decided: dict[str, Any] = {
        field.name: given.switch(getattr(family.switches, field.name)) for field in fields(Parts)
    }
    parts = Parts(**decided)
    return Config(
        family=family,
        raw=raw,
        width=width,
        depth=given.size("num_hidden_layers"),
        heads=heads,
        hidden=_hidden(given, width, parts.gated),
        activation=_activation(given, parts.gated),
        eps=given.share("layer_norm_eps"),
        patch=patch,
        grid=_grid(given, patch),
        registers=given.size("num_register_tokens", 0, least=0) if family.stem.registers else 0,
        parts=parts,
    )


def read_table(text: str, path: str) -> dict[str, Any]:
    """Return the table in a JSON text. Raises `BadInputError` if there is none."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"cannot read {path}", str(error), "fetch it again") from error
    if not isinstance(table, dict):
        raise BadInputError(f"cannot read {path}", f"it holds {type(table).__name__}, no table", "fetch it again")
    return table


def _tower(whole: dict[str, Any]) -> dict[str, Any]:
    """Return the table of the vision tower in a model of images and text; else the whole table."""
    tower = whole.get("vision_config")
    if not isinstance(tower, dict) or str(whole.get("model_type")) in FAMILIES:
        return whole
    usual = f"{whole.get('model_type')}_vision_model"  # older files omit the type of the tower
    return {"model_type": usual, **tower}


def _family(raw: dict[str, Any], place: str) -> Family:
    name = str(raw.get("model_type", "none"))
    if name in REFUSED:
        block, reason = REFUSED[name]
        raise _bad(place, f"{block} of its {name} {reason}", "use a pre-norm ViT whose blocks all have one width")
    if experts := next((key for key in EXPERT_KEYS if isinstance(raw.get(key), int) and raw[key] > 1), None):
        raise _bad(place, f"the block of its {name} {EXPERTS} ({experts} {raw[experts]})", "use a dense ViT")
    if name not in FAMILIES:
        raise _bad(place, f"its model_type {name!r} is not supported", f"supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


@dataclass(frozen=True)
class _Given:
    """The values of a configuration, each checked when it is read."""

    values: Mapping[str, Any]
    place: str

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _bad(self.place, f"{key} is {value!r}, no count")
        return value

    def side(self, key: str) -> int:
        """Return the side of a square, which may be given as a pair."""
        value = self.values.get(key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if isinstance(value, list):
            raise _bad(self.place, f"{key} is {value}, no square")
        return _Given({key: value}, self.place).size(key)

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise _bad(self.place, f"{key} is {value!r}, no number")
        return float(value)

    def share(self, key: str) -> float:
        value = self.number(key)
        if value >= 1:
            raise _bad(self.place, f"{key} is {value:g}, but must be below 1")
        return value

    def switch(self, switch: str | bool | None) -> bool | None:
        if not isinstance(switch, str):
            return switch
        key = switch.removeprefix("not ")
        return bool(self.values.get(key)) is (key == switch)


def _hidden(given: _Given, width: int, gated: bool | None) -> int:
    """Return the hidden width of the MLP; DINOv2 gives a ratio instead, of which a gated MLP has two thirds."""
    if "mlp_ratio" not in given.values:
        return given.size("intermediate_size")
    hidden = int(width * given.number("mlp_ratio"))
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden  # rounded up to a multiple of 8, as in the library


def _activation(given: _Given, gated: bool | None) -> str:
    """Return the activation by its name in a layer map; DINOv2's gated MLP always has SiLU."""
    name = "silu" if gated and "mlp_ratio" in given.values else given.values.get("hidden_act")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise _bad(given.place, f"its activation {name!r} is not supported", f"supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _grid(given: _Given, patch: int) -> int:
    """Return the patches per side at the native size; SigLIP 2, for any aspect ratio, gives the number of positions."""
    if "num_patches" not in given.values:
        grid = given.side("image_size") // patch
    else:
        patches = given.size("num_patches")
        grid = math.isqrt(patches)
        if grid**2 != patches:
            raise _bad(given.place, f"num_patches {patches} is no square")
    if grid < 1:
        raise _bad(given.place, f"its images of {given.side('image_size')} pixels have no patch of {patch}")
    return grid


def _bad(place: str, why: str, remedy: str = "is it the right config.json?") -> BadInputError:
    return BadInputError(f"cannot use {place}", why, remedy)


POST_NORM = "is post-norm: it normalizes the output of a sub-layer, not its input"
HIERARCHICAL = "is hierarchical: the tokens change in number and width between stages"
CONVOLUTIONAL = "is convolutional: there are no tokens whose residual stream could be followed"
EXPERTS = "is a mixture of experts: tokens take different MLPs, which have no common linear part"

REFUSED: Mapping[str, tuple[str, str]] = {
    "swin": ("SwinLayer", HIERARCHICAL),
    "maskformer-swin": ("MaskFormerSwinLayer", HIERARCHICAL),
    "donut-swin": ("DonutSwinLayer", HIERARCHICAL),
    "swinv2": ("Swinv2Layer", POST_NORM),
    "swin2sr": ("Swin2SRLayer", POST_NORM),
    "hiera": ("HieraLayer", HIERARCHICAL),
    "sam2_hiera_det_model": ("Sam2MultiScaleBlock", HIERARCHICAL),
    "dinat": ("DinatLayer", HIERARCHICAL),
    "pvt": ("PvtLayer", HIERARCHICAL),
    "pvt_v2": ("PvtV2BlockLayer", HIERARCHICAL),
    "segformer": ("SegformerLayer", HIERARCHICAL),
    "glpn": ("GLPNLayer", HIERARCHICAL),
    "levit": ("LevitResidualLayer", HIERARCHICAL),
    "cvt": ("CvtLayer", HIERARCHICAL),
    "mobilevit": ("MobileViTLayer", HIERARCHICAL),
    "mobilevitv2": ("MobileViTV2Layer", HIERARCHICAL),
    "swiftformer": ("SwiftFormerEncoderBlock", HIERARCHICAL),
    "groupvit": ("GroupViTStage", HIERARCHICAL),
    "groupvit_vision_model": ("GroupViTStage", HIERARCHICAL),
    "poolformer": ("PoolFormerLayer", CONVOLUTIONAL),
    "focalnet": ("FocalNetLayer", CONVOLUTIONAL),
    "convnext": ("ConvNextLayer", CONVOLUTIONAL),
    "convnextv2": ("ConvNextV2Layer", CONVOLUTIONAL),
    "dinov3_convnext": ("DINOv3ConvNextLayer", CONVOLUTIONAL),
    "resnet": ("ResNetBottleNeckLayer", CONVOLUTIONAL),
    "rt_detr_resnet": ("RTDetrResNetBottleNeckLayer", CONVOLUTIONAL),
    "regnet": ("RegNetYLayer", CONVOLUTIONAL),
    "bit": ("BitBottleneckLayer", CONVOLUTIONAL),
    "efficientnet": ("EfficientNetBlock", CONVOLUTIONAL),
    "align_vision_model": ("AlignVisionBlock", CONVOLUTIONAL),
    "mobilenet_v1": ("MobileNetV1ConvLayer", CONVOLUTIONAL),
    "mobilenet_v2": ("MobileNetV2InvertedResidual", CONVOLUTIONAL),
    "hgnet_v2": ("HGNetV2BasicLayer", CONVOLUTIONAL),
}

# Keys of `config.json` for the number of experts of an MLP, in any family.
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
