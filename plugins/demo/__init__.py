"""The example to read: a small Vision Transformer made from a seed, with one known singular defect planted in it.

`demo_vit` has the defect and `demo_vit_clean` is its twin without; both draw their own images. A plugin is this file's
three hooks; the model is in `model.py`, the planting in `planting.py`, the images in `drawing.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from sinder_cli import (
    AttentionMap,
    Backbone,
    BlockMap,
    LayerMap,
    Listing,
    MemoryTensors,
    ModelRequest,
    NormMap,
    PlainMlpMap,
    PositionMap,
    UsageError,
    WeightRef,
    Weights,
    attention_kernel,
    hookimpl,
)

SINDER_API = 1

WIDTH, DEPTH, HEADS, HIDDEN, PATCH, GRID = 192, 12, 3, 768, 14, 20
PLANTED = {"demo_vit": True, "demo_vit_clean": False}


@hookimpl
def sinder_listing() -> Sequence[Listing]:
    """Both twins."""
    per_block = 4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN + 9 * WIDTH + HIDDEN
    parameters = DEPTH * per_block + WIDTH * (3 * PATCH * PATCH + GRID * GRID + 5)
    return [
        Listing("demo_vit", "small ViT from a seed, a defect planted in block 5", parameters, PATCH, 1),
        Listing("demo_vit_clean", "its twin without the defect", parameters, PATCH, 1),
    ]


@hookimpl
def sinder_weights(request: ModelRequest) -> MemoryTensors:
    """Make the weights; nothing is stored."""
    planted = _planted(request.model)
    from .planting import demo_weights

    return MemoryTensors(request.model, demo_weights(planted))


@hookimpl
def sinder_backbone(request: ModelRequest, weights: Weights) -> Backbone:
    """Describe the demo ViT."""
    _planted(request.model)
    from .drawing import draw_images
    from .model import DemoVit

    attention = attention_kernel(request.attention)
    return Backbone(
        name=request.model,
        layers=LayerMap(
            width=WIDTH,
            blocks=tuple(_block(f"blocks.{index}") for index in range(DEPTH)),
            position=PositionMap(weight=WeightRef(name="position"), prefix=1),
        ),
        weights=weights,
        patch_size=PATCH,
        prefix_tokens=1,
        has_cls=True,
        image_size=GRID * PATCH,
        build=lambda: DemoVit(attention),
        embed=lambda module, images: (module.embed(images), None),
        run_block=lambda module, index, tokens, _: module.blocks[index](tokens),
        finish=lambda module, tokens: module.norm(tokens),
        sample_images=draw_images,
    )


def _planted(model: str) -> bool:
    if model not in PLANTED:
        raise UsageError(f"unknown model {model!r}", "the demo plugin has two", f"use {' or '.join(PLANTED)}")
    return PLANTED[model]


def _block(at: str) -> BlockMap:
    def ref(name: str, start: int | None = None) -> WeightRef:
        rows = None if start is None else (start * WIDTH, (start + 1) * WIDTH)
        return WeightRef(name=f"{at}.{name}", rows=rows)

    def norm(name: str) -> NormMap:
        return NormMap(weight=ref(f"{name}.weight"), bias=ref(f"{name}.bias"))

    return BlockMap(
        attention=AttentionMap(
            norm=norm("norm1"),
            query=ref("qkv.weight", 0),
            key=ref("qkv.weight", 1),
            value=ref("qkv.weight", 2),
            output=ref("out.weight"),
            query_bias=ref("qkv.bias", 0),
            key_bias=ref("qkv.bias", 1),
            value_bias=ref("qkv.bias", 2),
            output_bias=ref("out.bias"),
        ),
        mlp=PlainMlpMap(
            norm=norm("norm2"),
            activation="gelu",
            up=ref("up.weight"),
            up_bias=ref("up.bias"),
            down=ref("down.weight"),
            down_bias=ref("down.bias"),
        ),
    )
