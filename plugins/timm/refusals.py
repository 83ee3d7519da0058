"""Why a model of timm's is no plain Vision Transformer, told from its structure."""

from __future__ import annotations

from torch import nn


def structure(module: nn.Module) -> str:
    """One phrase that names the block and the reason, for a module that is neither VisionTransformer nor Eva."""
    block = _first_block(module)
    named = f"{block[0]} is {type(block[1]).__name__}" if block else f"it is {type(module).__name__}"
    return f"{named}, {_reason(module, block[1] if block else module)}"


def _first_block(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The first part that is called a block, and is no list of them."""
    blocks = ((name, part) for name, part in module.named_modules() if type(part).__name__.endswith(("Block", "Layer")))
    return next(((name, part) for name, part in blocks if any(True for _ in part.parameters())), None)


def _reason(module: nn.Module, block: nn.Module) -> str:
    if any(isinstance(part, nn.Conv1d | nn.Conv2d) for part in block.modules()):
        return "which convolves: a layer map tells attention and MLP alone"
    widths = [int(stage["num_chs"]) for stage in getattr(module, "feature_info", ())]
    if widths and widths[0] != widths[-1]:
        return f"and its width grows from {widths[0]} to {widths[-1]}: a hierarchical model has no one residual stream"
    return f"and {type(module).__name__} is neither timm's VisionTransformer nor its Eva"
