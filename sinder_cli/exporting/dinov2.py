"""Target `dinov2`: the official DINOv2 layout, for any backbone that fits into it.

`dinov2_custom` and the authors' own code load it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.weights import Weights
from sinder_cli.errors import BadInputError
from sinder_cli.exporting.conversion import ConvertedTensors
from sinder_cli.exporting.layouts import Layout, architecture_of, recipes
from sinder_cli.exporting.native import loading_of_weights, read_back, write_weights
from sinder_cli.exporting.targets import ExportCheck, ExportTarget, Plan

NORM_EPS = 1e-6  # of DINOv2: it is in its code, not in its files

LAYOUT = Layout(
    cls="cls_token",
    position="pos_embed",
    registers="register_tokens",
    mask="mask_token",
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
    up="mlp.fc1",
    down="mlp.fc2",
    scale2="ls2.gamma",
)
GATED = replace(LAYOUT, gate="mlp.w12", up="mlp.w12", down="mlp.w3")


def converted(backbone: Backbone) -> Weights:
    """Return the weights under DINOv2's names. Raises `BadInputError` with the reason if its code cannot run them."""
    architecture = architecture_of(backbone, "dinov2")
    expected = "silu" if architecture.gated else "gelu"
    reasons = {
        "it has a norm before its first block": architecture.has_stem_norm,
        f"its activation is {architecture.activation}, not {expected}": architecture.activation != expected,
        f"its norms have eps {architecture.eps}, not {NORM_EPS}": architecture.eps != NORM_EPS,
    }
    for why, applies in reasons.items():
        if applies:
            raise BadInputError(f"cannot export {backbone.name} to dinov2", why, "use --to native")
    layout = GATED if architecture.gated else LAYOUT
    dtype = backbone.weights.info(backbone.weights.names[0]).dtype
    return Weights.of(ConvertedTensors(backbone.weights, recipes(layout, backbone, architecture), dtype))


def _require(plan: Plan) -> None:
    converted(plan.backbone)


def _write(plan: Plan, path: Path) -> None:
    write_weights(path, converted(plan.backbone))


def _verify(plan: Plan, path: Path) -> ExportCheck:
    return read_back(path, converted(plan.backbone))


TARGET = ExportTarget(
    kind="file",
    summary="DINOv2's official keys, whatever library the backbone is from",
    write=_write,
    verify=_verify,
    loading=loading_of_weights,
    require=_require,
    suffixes=(".safetensors", ".pth", ".pt"),
    options=frozenset({"--dtype"}),
)
