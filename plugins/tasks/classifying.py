"""What the tasks on class folders share: the view of an image to be classified, and lists of numbers as settings."""

from __future__ import annotations

from sinder_cli import Backbone, UsageError
from sinder_cli.tasks import Part, View

CROP, RESIZE = 224, 256
VIEW = "crop"


def crop_view(backbone: Backbone, size: int | None, parts: tuple[Part, ...]) -> View:
    """Return DINOv2's view of an image to be classified: 256 / 224 of the crop, then its centre."""
    if not backbone.has_cls:
        raise UsageError(f"cannot classify with {backbone.name}", "it has no cls token", "choose a dense task")
    crop = (size or CROP) // backbone.patch_size * backbone.patch_size
    return View(parts, round(crop * RESIZE / CROP), resize="square", crop=crop)


def split_at_commas(value: object) -> object:
    """Return the parts of a setting that is written as `1,2`; anything else as it is."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value
