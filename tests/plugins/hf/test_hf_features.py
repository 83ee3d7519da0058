"""What goes through our blocks is what goes through the library's own model, family by family."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_samples import PATCH, SAMPLES, Sample
from torch import Tensor, nn
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from sinder_cli import Backbone, UnavailableError
from sinder_cli.backbone.opening import load_module

TOLERANCE = 1e-5
RESIZING = ("ViT", "DeiT", "MAE", "MSN", "CLIP", "Siglip", "IJepa")  # models that must be told that the size is another

Saved = Callable[[str], Path]
Opened = Callable[..., Backbone]


def images(rows: int, columns: int) -> Tensor:
    return torch.randn(2, 3, rows * PATCH, columns * PATCH, generator=torch.Generator().manual_seed(1))


def ours(backbone: Backbone, batch: Tensor) -> list[Tensor]:
    """The tokens that enter the first block, those after each, and the finished ones."""
    module = load_module(backbone)
    with torch.no_grad():
        tokens, context = backbone.embed(module, batch)
        states = [tokens]
        for index in range(backbone.depth):
            states.append(backbone.run_block(module, index, states[-1], context))
        return [*states, backbone.finish(module, states[-1])]


def theirs(sample: Sample, batch: Tensor) -> list[Tensor]:
    model = sample.made()
    encoder: nn.Module = model.get_submodule(sample.encoder)
    with torch.no_grad():
        output = encoder(**inputs(sample, batch), output_hidden_states=True)
    return [*output.hidden_states, output.last_hidden_state]


def inputs(sample: Sample, batch: Tensor) -> dict[str, Any]:
    """A batch as the library's model takes it: MAE unmasked and in order, SigLIP 2 in patches."""
    rows, columns = (side // PATCH for side in batch.shape[-2:])
    if sample.model.startswith("Siglip2"):
        patches = [torch.as_tensor(convert_image_to_patches(image.numpy(), PATCH)) for image in batch]
        mask = torch.ones(len(batch), rows * columns, dtype=torch.long)
        shapes = torch.tensor([[rows, columns]] * len(batch))
        return {"pixel_values": torch.stack(patches), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    resizing = {"interpolate_pos_encoding": True} if any(name in sample.model for name in RESIZING) else {}
    noise = torch.arange(float(rows * columns)).expand(len(batch), -1)
    return {"pixel_values": batch, **resizing, **({"noise": noise} if "MAE" in sample.model else {})}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("grid", [(5, 5), (6, 9)], ids=["native", "wider"])
def test_every_hidden_state_is_that_of_the_library(
    name: str, grid: tuple[int, int], saved: Saved, opened: Opened
) -> None:
    batch = images(*grid)
    found, expected = ours(opened(saved(name)), batch), theirs(SAMPLES[name], batch)
    assert len(found) == len(expected) == 5
    changed = [float((after - before).abs().max()) for before, after in pairwise(found[:-1])]
    assert min(changed) > 0.01, "a block that does nothing would prove nothing"
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape
        assert float((mine - other).abs().max() / other.abs().max()) <= TOLERANCE


@pytest.mark.parametrize("name", SAMPLES)
def test_prefix_tokens_come_first_and_then_the_patches(name: str, saved: Saved, opened: Opened) -> None:
    """Another colour in the patch at row 1, column 2 changes its token and no other before the first block."""
    backbone = opened(saved(name))
    batch, module = images(5, 5), load_module(backbone)
    other = batch.clone()
    other[:, :, PATCH : 2 * PATCH, 2 * PATCH : 3 * PATCH] += 1
    with torch.no_grad():
        change = (backbone.embed(module, other)[0] - backbone.embed(module, batch)[0]).abs().amax(dim=(0, 2))
    assert backbone.prefix_tokens == SAMPLES[name].prefix
    assert change.nonzero().flatten().tolist() == [SAMPLES[name].prefix + 1 * 5 + 2]
    assert backbone.has_cls is (SAMPLES[name].prefix > 0)


@pytest.mark.parametrize("name", ["DINOv2", "DINOv3", "BEiT", "Data2Vec", "CLIP"])
def test_attention_written_out_gives_the_same(name: str, saved: Saved, opened: Opened) -> None:
    batch = images(5, 5)
    fused, eager = ours(opened(saved(name)), batch), ours(opened(saved(name), attention="eager"), batch)
    assert float((fused[-1] - eager[-1]).abs().max()) <= 1e-4
    assert not torch.equal(fused[-1], eager[-1]), "another kernel has other last bits"


def test_an_image_of_broken_patches_is_refused(saved: Saved, opened: Opened) -> None:
    backbone = opened(saved("DINOv2"))
    with pytest.raises(UnavailableError, match="40 × 44 px is not made of patches of 8 px"):
        backbone.embed(load_module(backbone), torch.zeros(1, 3, 40, 44))
