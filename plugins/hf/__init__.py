"""Vision transformers of Hugging Face's library, from a local folder or from the hub: `hf/./FOLDER`, `hf/OWNER/NAME`.

The layer map comes from `config.json` and the names of the tensors; transformers is imported when a module is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import sinder_cli as sinder

if TYPE_CHECKING:
    from .folder import DescribedWeights

SINDER_API = 1


@sinder.hookimpl
def sinder_listing() -> Sequence[sinder.Listing]:
    """List the two forms of names: a repository of the hub, and a folder."""
    families = "DINOv2, DINOv3, ViT, DeiT, MAE, MSN, BEiT, CLIP, SigLIP, I-JEPA or Data2Vec"
    needs = ("transformers", "huggingface_hub")
    return [
        sinder.Listing("hf/OWNER/NAME", f"{families}, from the Hugging Face hub", requires=needs, revisions=True),
        sinder.Listing("hf/./FOLDER", f"{families}, from a folder that save_pretrained wrote", requires=needs),
    ]


@sinder.hookimpl
def sinder_weights(request: sinder.ModelRequest) -> DescribedWeights:
    """Return the weights in the folder, or in the repository, from which only the necessary files are downloaded."""
    from .describing import described_weights

    return described_weights(request)


@sinder.hookimpl
def sinder_backbone(request: sinder.ModelRequest, weights: sinder.Weights) -> sinder.Backbone:
    """Describe the encoder of `config.json` with these weights."""
    from .describing import backbone

    return backbone(request, weights)
