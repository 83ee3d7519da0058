"""An example plugin: a small Vision Transformer made from a seed, with one known singular defect planted in it.

`demo_vit` has the defect and `demo_vit_clean` is the same model without it; both draw their own images. The plugin is
the three hooks of this file; the model is in `model.py`, the planting in `planting.py`, the images in `drawing.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from math import prod

import sinder_cli as sinder

SINDER_API = 1

WIDTH, DEPTH, HEADS, HIDDEN, PATCH, GRID = SIZES = 192, 12, 3, 768, 14, 20
NORM_EPS = 1e-5  # PyTorch's default
PLANTED = {"demo_vit": True, "demo_vit_clean": False}


@sinder.hookimpl
def sinder_listing() -> Sequence[sinder.Listing]:
    """List both models."""
    parameters = sum(prod(shape) for shape in tensor_shapes().values())
    return [
        sinder.Listing("demo_vit", "small ViT from a seed, a defect planted in block 5", parameters, PATCH, 1),
        sinder.Listing("demo_vit_clean", "its twin without the defect", parameters, PATCH, 1),
    ]


@sinder.hookimpl
def sinder_weights(request: sinder.ModelRequest) -> sinder.MemoryTensors:
    """Make the weights; nothing is stored."""
    from .planting import demo_weights

    return sinder.MemoryTensors(request.model, demo_weights(PLANTED[request.model]))


@sinder.hookimpl
def sinder_backbone(request: sinder.ModelRequest, weights: sinder.Weights) -> sinder.Backbone:
    """Describe the demo ViT. Raises `BadInputError` for weights of another model."""
    sinder.require_matching(tensor_shapes(), weights, request.model)
    from .drawing import draw_images
    from .model import DemoVit

    attention = sinder.attention_kernel(request.attention)
    return sinder.Backbone(
        name=request.model,
        layers=sinder.LayerMap(
            width=WIDTH,
            blocks=tuple(_block(f"blocks.{index}") for index in range(DEPTH)),
            position=sinder.PositionMap(weight=sinder.WeightRef(name="position"), prefix=1),
            stem=sinder.StemMap(
                patch=sinder.WeightRef(name="patches.weight"),
                patch_bias=sinder.WeightRef(name="patches.bias"),
                cls=sinder.WeightRef(name="cls"),
            ),
            norm=sinder.NormMap(
                weight=sinder.WeightRef(name="norm.weight"), bias=sinder.WeightRef(name="norm.bias"), eps=NORM_EPS
            ),
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
        forward=lambda module, images: module(images),
        sample_images=draw_images,
        hub_source=_hub_source,
    )


def _hub_source() -> dict[str, str]:
    """Return the module's own file, and the sizes that it takes from its package."""
    sizes = f'"""The sizes of the demo backbone."""\n\nWIDTH, DEPTH, HEADS, HIDDEN, PATCH, GRID = {SIZES}\n'
    return {"__init__.py": sizes, "model.py": files(__package__).joinpath("model.py").read_text()}


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of the model's state dict, in its order."""
    shapes: dict[str, tuple[int, ...]] = {"cls": (1, 1, WIDTH), "position": (1, 1 + GRID * GRID, WIDTH)}
    shapes |= _affine("patches", (WIDTH, 3, PATCH, PATCH))
    for index in range(DEPTH):
        at = f"blocks.{index}"
        shapes |= _affine(f"{at}.norm1", (WIDTH,))
        shapes |= _affine(f"{at}.qkv", (3 * WIDTH, WIDTH)) | _affine(f"{at}.out", (WIDTH, WIDTH))
        shapes |= _affine(f"{at}.norm2", (WIDTH,))
        shapes |= _affine(f"{at}.up", (HIDDEN, WIDTH)) | _affine(f"{at}.down", (WIDTH, HIDDEN))
    return shapes | _affine("norm", (WIDTH,))


def _affine(name: str, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _block(at: str) -> sinder.BlockMap:
    def ref(name: str, start: int | None = None) -> sinder.WeightRef:
        rows = None if start is None else (start * WIDTH, (start + 1) * WIDTH)
        return sinder.WeightRef(name=f"{at}.{name}", rows=rows)

    def norm(name: str) -> sinder.NormMap:
        return sinder.NormMap(weight=ref(f"{name}.weight"), bias=ref(f"{name}.bias"), eps=NORM_EPS)

    return sinder.BlockMap(
        attention=sinder.AttentionMap(
            norm=norm("norm1"),
            query=ref("qkv.weight", 0),
            key=ref("qkv.weight", 1),
            value=ref("qkv.weight", 2),
            output=ref("out.weight"),
            query_bias=ref("qkv.bias", 0),
            key_bias=ref("qkv.bias", 1),
            value_bias=ref("qkv.bias", 2),
            output_bias=ref("out.bias"),
            heads=HEADS,
        ),
        mlp=sinder.PlainMlpMap(
            norm=norm("norm2"),
            activation="gelu",
            up=ref("up.weight"),
            up_bias=ref("up.bias"),
            down=ref("down.weight"),
            down_bias=ref("down.bias"),
        ),
    )
