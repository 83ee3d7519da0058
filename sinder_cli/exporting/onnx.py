"""Target `onnx`: one file, images of one size, any number → cls, registers and patch tokens after the final norm."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinder_cli.backbone.opening import load_module
from sinder_cli.errors import BadInputError, SinderError, UnavailableError, UsageError, excerpt
from sinder_cli.exporting.targets import ExportCheck, ExportTarget, Loading, Plan
from sinder_cli.exporting.verifying import NOT_LOADED, by_kind, normalized_tokens, square_images, verify_features
from sinder_cli.memory import is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sinder_cli.backbone.contract import Backbone

TOLERANCE = 1e-4  # relative, in float32: other kernels sum in another order
MOST_BYTES = 2**31 - (1 << 24)  # of weights: one file is one protobuf message, which must be under 2 GiB
LIBRARIES = ("onnx", "onnxscript")
RUNTIME = ("onnxruntime",)
CHECK = "load_onnx.py"


def _require(plan: Plan) -> None:
    backbone, size = plan.backbone, plan.settings.image_size
    what = f"cannot export {backbone.name} to onnx"
    if size is not None and size % backbone.patch_size:
        why = f"{size} pixels are not a multiple of the patch size {backbone.patch_size}"
        raise UsageError(what, why, f"use --image-size {max(plan.image_size, backbone.patch_size)}")
    dynamic = plan.settings.dynamic_size
    if dynamic and not plan.settings.verify:
        why = "a graph of dynamic size is kept only if it was verified"
        raise UsageError(what, why, "leave --no-verify or --dynamic-size out")
    needed = (*LIBRARIES, *RUNTIME) if dynamic else LIBRARIES
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UnavailableError(what, f"{' and '.join(missing)} not installed", "pip install 'sinder-cli[onnx]'")
    weights = backbone.weights
    size = sum(4 * prod(weights.shape(name)) for name in weights.names)
    if size > MOST_BYTES:
        why = f"its weights are {size / 1e9:.1f} GB in float32, and one ONNX file holds under 2.1"
        raise BadInputError(what, why, "use another format")


def _write(plan: Plan, path: Path) -> None:
    import torch

    graph = _graph(plan.backbone)
    side = plan.image_size
    example = torch.zeros(2, 3, side, side)
    sizes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if plan.settings.dynamic_size:
        patch, most = plan.backbone.patch_size, 512
        sizes |= {axis: patch * torch.export.Dim(name, max=most) for axis, name in ((2, "rows"), (3, "columns"))}
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                torch.export.export(graph, (example,), dynamic_shapes=(sizes,)),
                (),
                dynamo=True,
                dynamic_shapes=(sizes,),  # given again, for their names
                input_names=["images"],
                output_names=list(_names(plan.backbone)),
                external_data=False,
                verbose=False,
            )
        except (SinderError, OSError, MemoryError):
            raise
        except Exception as error:  # the exporter can raise anything
            if is_out_of_memory(error):
                raise
            why = "PyTorch's exporter" + (
                " needs a fixed size" if plan.settings.dynamic_size else f" says: {excerpt(str(error))}"
            )
            raise _refused(plan, why) from error
        assert program is not None
        program.save(path, external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the log messages and warnings of the exporter."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _refused(plan: Plan, why: str) -> BadInputError:
    wanted = " with dynamic size" if plan.settings.dynamic_size else ""
    remedy = "leave --dynamic-size out" if wanted else "use another format"
    return BadInputError(f"cannot export {plan.backbone.name} to onnx{wanted}", why, remedy)


def _graph(backbone: Backbone) -> nn.Module:
    """Return a module whose `forward(images)` gives the outputs in order; position embeddings become constants."""
    from torch import nn

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = load_module(backbone)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            return tuple(by_kind(backbone, normalized_tokens(backbone, self.module, images)).values())

    return Graph().eval()


def _names(backbone: Backbone) -> list[str]:
    """Return the names of the outputs, those of `by_kind` in its order."""
    first = ["cls"] if backbone.has_cls else []
    return [*first, *(["registers"] if backbone.prefix_tokens > len(first) else []), "patch_tokens"]


def _tokens_by_kind(backbone: Backbone, module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return by_kind(backbone, normalized_tokens(backbone, module, images))


def _verify(plan: Plan, path: Path) -> ExportCheck:
    images = square_images(plan)
    batches = [images, images[:1]]  # the number of images is dynamic
    if not plan.settings.dynamic_size:
        return verify_features(plan, path, CHECK, RUNTIME, _tokens_by_kind, batches, TOLERANCE)
    patch = plan.backbone.patch_size
    batches += [images[:, :, : 4 * patch, : 5 * patch], images[:, :, : 3 * patch, : 2 * patch]]
    try:
        return verify_features(plan, path, CHECK, RUNTIME, _tokens_by_kind, batches, TOLERANCE)
    except BadInputError as error:  # most exporters fix the position embedding at one size
        detail = "at one of them it cannot be run" if NOT_LOADED in error.why else error.why
        raise _refused(plan, f"the graph is not right at three sizes that were tried: {detail}") from error


def _loading(_: Plan, place: str) -> Loading:
    return Loading("import onnxruntime", f"session = onnxruntime.InferenceSession({place!r})")


TARGET = ExportTarget(
    kind="file",
    summary="one file for onnxruntime and similar runtimes, of one image size and any batch size",
    write=_write,
    verify=_verify,
    loading=_loading,
    require=_require,
    suffixes=(".onnx",),
    options=frozenset({"--image-size", "--dynamic-size"}),
)
