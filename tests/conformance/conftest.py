"""The small ViT, ready to be looked at, right or with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from drawn_vit import Shape, read, vit

from sinder_cli import Backbone, BlockMap
from sinder_cli.backbone.opening import load_module
from sinder_cli.conformance.subject import Candidate


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def subject() -> Callable[..., Candidate]:
    """The backbone of a shape; its module has the right weights, whatever is replaced in what the plugin says."""

    def made(shape: Shape = Shape(), **wrong: Any) -> Candidate:  # noqa: B008 - it is frozen
        backbone = vit(shape)
        return Candidate(replace(backbone, **wrong), load_module(backbone), lambda path: read(path, shape))

    return made


@pytest.fixture
def mapped() -> Callable[[Backbone, Callable[[BlockMap], BlockMap]], Any]:
    """The layer map of a backbone with its second block changed."""

    def changed(backbone: Backbone, change: Callable[[BlockMap], BlockMap]) -> Any:
        first, second = backbone.layers.blocks
        return backbone.layers.model_copy(update={"blocks": (first, change(second))})

    return changed
