"""What the author of a task plugin imports: the contract of tasks, and helpers to read data and to draw.

A plugin is a module that an entry point of the group `sinder.tasks` names by the name of its task. It says
`SINDER_API = 1`, and its `sinder_task()`, marked with `hookimpl`, returns a `Task`; it must not import torch for that.
docs/evaluate.md shows a whole one.
"""

from typing import TYPE_CHECKING, Any

from sinder_cli.evaluation.boxes import Box, Boxes, boxed_images
from sinder_cli.evaluation.contract import (
    Dataset,
    Features,
    Figure,
    Part,
    Pixels,
    Places,
    Scores,
    Scoring,
    SideFeatures,
    Task,
    View,
    mean_figure,
)
from sinder_cli.evaluation.depths import DepthMap, depth_pairs, read_depth
from sinder_cli.evaluation.label_layouts import labelled_images
from sinder_cli.evaluation.labels import IGNORED, ClassMap, LabelImage, LabelRule
from sinder_cli.evaluation.layouts import class_folders
from sinder_cli.evaluation.settings import TaskSettings
from sinder_cli.events import tracked
from sinder_cli.images.sources import ImageFiles, ImageSource

if TYPE_CHECKING:
    from sinder_cli.defects.shift import found_again
    from sinder_cli.evaluation.drawing import enlarged, map_picture, pca_picture, shrunk, with_boxes

__all__ = [
    "IGNORED",
    "Box",
    "Boxes",
    "ClassMap",
    "Dataset",
    "DepthMap",
    "Features",
    "Figure",
    "ImageFiles",
    "ImageSource",
    "LabelImage",
    "LabelRule",
    "Part",
    "Pixels",
    "Places",
    "Scores",
    "Scoring",
    "SideFeatures",
    "Task",
    "TaskSettings",
    "View",
    "boxed_images",
    "class_folders",
    "depth_pairs",
    "enlarged",
    "found_again",
    "labelled_images",
    "map_picture",
    "mean_figure",
    "pca_picture",
    "read_depth",
    "shrunk",
    "tracked",
    "with_boxes",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used."""
    if name == "found_again":
        from sinder_cli.defects.shift import found_again

        return found_again
    if name in {"enlarged", "map_picture", "pca_picture", "shrunk", "with_boxes"}:
        from sinder_cli.evaluation import drawing

        return getattr(drawing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
