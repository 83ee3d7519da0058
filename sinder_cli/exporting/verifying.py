"""Check that another library computes the same features from what was written.

Our features are computed here. Then another process runs the script of the target, in `checks/`: it loads what was
written with the target's library alone, and computes features of the same pixels. It is called as

    python SCRIPT WRITTEN PIXELS FEATURES

PIXELS is a safetensors file of normalized images `[B, 3, H, W]`, one tensor per batch, named `0`, `1`, …; the script
writes tensors `[B, …, N]` for each batch into FEATURES, named `0.cls` and so on, with the names that `ours` gives. On
standard output it prints one JSON document with the versions of its libraries.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.backbone.opening import load_module
from sinder_cli.backbone.sources import infos_of
from sinder_cli.backbone.storing import write_safetensors
from sinder_cli.defects.tokens import residual_stream
from sinder_cli.errors import BadInputError, SinderError, TryAgainError, UnavailableError, excerpt
from sinder_cli.events import Finished, Started
from sinder_cli.exporting.targets import ExportCheck, Plan
from sinder_cli.images.decoding import UnreadableImageError
from sinder_cli.images.drawn import DrawnPictures
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.sources import DrawnImages, ImageSource
from sinder_cli.signals import death_words, was_sent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sinder_cli.backbone.contract import Backbone

    Ours = Callable[[Backbone, nn.Module, Tensor], dict[str, Tensor]]

IMAGES = 2
DRAWN_SIDE = 640  # pixels
TOLERANCE = 1e-5  # relative, in float32
NOT_LOADED = "it cannot be loaded"  # or run
CHECKS = Path(__file__).parent / "checks"


def verify_features(
    plan: Plan,
    written: Path,
    script: str,
    libraries: Sequence[str],
    ours: Ours,
    batches: Sequence[Tensor] | None = None,
    tolerance: float = TOLERANCE,
) -> ExportCheck:
    """Compare our features with those of a target's library, token by token.

    `ours(backbone, module, images)` returns named features `[B, …, N]`; the weights are in float32, whatever is stored.
    `batches` are images `[B, 3, H, W]`, by default two squares of the plan's image size. The measure is the largest
    ‖theirs − ours‖ / ‖ours‖ over all tokens. Raises `BadInputError` above the tolerance, or if the library fails; if it
    is not installed, the returned check is not verified.
    """
    if missing := [name for name in libraries if find_spec(name) is None]:
        return ExportCheck(f"not checked: {' and '.join(missing)} not installed", verified=False)
    given = list(batches) if batches is not None else [square_images(plan)]
    expected = _our_features(plan, given, ours)
    plan.emit(Started("checking what was written"))
    found, versions = _their_features(written, CHECKS / script, given, plan.backbone.name, libraries)
    plan.emit(Finished("checking what was written"))
    what = f"export of {plan.backbone.name} failed"
    if found.keys() != expected.keys():
        raise BadInputError(
            what, f"it gives {', '.join(sorted(found))}, not {', '.join(sorted(expected))}", "report it"
        )
    difference = 0.0
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            why = f"{name} is {list(found[name].shape)}, not {list(tensor.shape)}"
            raise BadInputError(what, why, "report it")
        difference = max(difference, relative_difference(found[name], tensor))
    using = " and ".join(f"{name} {version}" for name, version in versions.items())
    if not difference <= tolerance:
        why = f"features of {using} differ by {difference:.1e}, and the tolerance is {tolerance:.0e}"
        raise BadInputError(what, why, "report it")
    sentence = f"features of {using} agree on {sum(map(len, given))} images"
    return ExportCheck(sentence, difference=difference, tolerance=tolerance, versions=versions)


def relative_difference(theirs: Tensor, ours: Tensor) -> float:
    """Return the largest ‖theirs − ours‖ / ‖ours‖ over tokens `[…, N]`; infinite or NaN if a feature is."""
    norms = ours.norm(dim=-1).clamp(min=1e-30)
    return ((theirs - ours).norm(dim=-1) / norms).max().item()


def normalized_tokens(backbone: Backbone, module: nn.Module, images: Tensor) -> Tensor:
    """Return the tokens after the final norm, `[B, prefix + patches, N]`, of images `[B, 3, H, W]`."""
    (last,) = deque(residual_stream(backbone, module, images), maxlen=1)
    return backbone.finish(module, last)


def all_tokens(backbone: Backbone, module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the normalized tokens as one feature, as most libraries give them."""
    return {"tokens": normalized_tokens(backbone, module, images)}


def by_kind(backbone: Backbone, tokens: Tensor) -> dict[str, Tensor]:
    """Split tokens `[B, T, N]` into those that exist: `cls` `[B, N]`, `registers`, `patch_tokens` `[B, …, N]`."""
    first, prefix = int(backbone.has_cls), backbone.prefix_tokens
    parts = {"cls": tokens[:, 0]} if first else {}
    if prefix > first:
        parts["registers"] = tokens[:, first:prefix]
    return parts | {"patch_tokens": tokens[:, prefix:]}


def square_images(plan: Plan) -> Tensor:
    """Return the first images that can be decoded, at most two, `[B, 3, S, S]`, normalized.

    Raises `BadInputError` if none can be decoded.
    """
    import torch

    backbone, images = plan.backbone, plan.images or own_images(plan.backbone)
    preprocess = Preprocessing(plan.image_size, backbone.mean, backbone.std)
    pixels: list[Tensor] = []
    for index in range(len(images)):
        with suppress(UnreadableImageError):
            pixels.append(preprocess(images.load(index)))
        if len(pixels) == IMAGES:
            break
    if not pixels:
        raise BadInputError("cannot check the export", "no image could be decoded", "name others with --data")
    return torch.stack(pixels)


def own_images(backbone: Backbone) -> ImageSource:
    """Return images for when the user named none: those that the backbone provides, or drawn ones."""
    if backbone.sample_images:
        return DrawnImages(tuple(backbone.sample_images(IMAGES, 0)), backbone.name)
    return DrawnPictures(IMAGES, DRAWN_SIDE, 0)


def _our_features(plan: Plan, batches: Sequence[Tensor], ours: Ours) -> dict[str, Tensor]:
    """Return features by batch and name; the module is freed when this returns."""
    import torch

    module = load_module(plan.backbone)
    features: dict[str, Tensor] = {}
    with torch.inference_mode():
        for number, images in enumerate(batches):
            named = ours(plan.backbone, module, images)
            features |= {f"{number}.{name}": tensor.contiguous() for name, tensor in named.items()}
    return features


def _died(returncode: int, libraries: Sequence[str], model: str, last: str) -> SinderError:
    """Return the error for a check that a signal ended: one sent from outside, or a crash in a library."""
    what, why = f"cannot check the export of {model}", f"the process that loads it is gone, {death_words(returncode)}"
    if was_sent(returncode):
        return TryAgainError(what, why, "run again, or give --no-verify")
    names = " and ".join(libraries) or "torch"
    return UnavailableError(what, f"{why}: {excerpt(last)}", f"reinstall {names}, or give --no-verify")


def _their_features(
    written: Path, script: Path, batches: Sequence[Tensor], model: str, libraries: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="sinder-check-") as folder:
        pixels, features = Path(folder, "pixels.safetensors"), Path(folder, "features.safetensors")
        named = {str(number): images for number, images in enumerate(batches)}
        write_safetensors(pixels, infos_of(named), named.values())
        command = [sys.executable, str(script), str(written), str(pixels), str(features)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        last = (done.stderr.strip().splitlines() or ["it gives no reason"])[-1]
        if done.returncode < 0:
            raise _died(done.returncode, libraries, model, last)
        if done.returncode:
            raise BadInputError(f"export of {model} failed", f"{NOT_LOADED}: {excerpt(last)}", "report it")
        return load_file(features), json.loads(done.stdout.splitlines()[-1])
