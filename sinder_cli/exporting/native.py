"""Target `native`: the backbone's own format, `.safetensors` or `.pth`, with official keys, order and dtype."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.backbone.sources import open_checkpoint
from sinder_cli.backbone.storing import write_safetensors
from sinder_cli.backbone.weights import Weights
from sinder_cli.errors import BadInputError
from sinder_cli.exporting.targets import Check, Plan, Target

if TYPE_CHECKING:
    from torch import Tensor


def _write(plan: Plan, path: Path) -> None:
    write_weights(path, plan.backbone.weights)


def write_weights(path: Path, weights: Weights) -> None:
    """Write all tensors under their export names, one at a time, in the format that the suffix indicates."""
    from sinder_cli.exporting.torchfile import write_torch_file

    write = write_safetensors if path.suffix == ".safetensors" else write_torch_file
    write(path, weights.output_infos(), (tensor for _, tensor in weights.stream(weights.names)))


def _verify(plan: Plan, path: Path) -> Check:
    return read_back(path, plan.backbone.weights)


def read_back(path: Path, weights: Weights) -> Check:
    """Compare names, order, shapes, dtypes and bits of a file with the weights.

    Raises `BadInputError` for a difference.
    """
    import torch

    what = f"export of {weights.source.label} failed"
    written = Weights.of(open_checkpoint(path))
    if list(written.output_infos().items()) != list(weights.output_infos().items()):
        raise BadInputError(what, "names, shapes or dtypes differ when they are read back", "report it")
    pairs = zip(weights.stream(weights.names), written.stream(written.names), strict=True)
    for (_, original), (output, copy) in pairs:
        if not torch.equal(_bits(original), _bits(copy)):
            raise BadInputError(what, f"{output} differs when it is read back", "check the disk")
    return Check("read back bit for bit", difference=0.0, tolerance=0.0, versions={"torch": torch.__version__})


def _bits(tensor: Tensor) -> Tensor:
    """Return the raw bytes of a tensor, so that NaN equals itself."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


TARGET = Target(
    kind="file",
    summary="the backbone's own keys, order and dtype",
    write=_write,
    verify=_verify,
    suffixes=(".safetensors", ".pth", ".pt"),
    options=frozenset({"--dtype"}),
)
