"""The settings of `sinder analyze`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from sinder_cli.defects.settings import MOST, DetectionSettings
from sinder_cli.images.preprocessing import Resize


def _split(value: object) -> object:
    """Return the numbers between the commas of an option, or `all`; a list stays as it is."""
    if value == "all":
        return value
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not parts or not all(str(part).strip().isdecimal() for part in parts):
        raise ValueError("give numbers of blocks, such as 9,19,29,39, or all")
    return parts


Blocks = Annotated[tuple[Annotated[int, Field(ge=0)], ...] | Literal["all"], BeforeValidator(_split)]


def _count_or_all(value: object) -> object:
    """Return a number of figures, or `all`."""
    if value == "all" or (str(value).isdecimal() and not isinstance(value, bool)):
        return value if value == "all" else int(str(value))
    raise ValueError("give 0 or more, or all")


Figures = Annotated[int | Literal["all"], BeforeValidator(_count_or_all)]


class AnalyzeSettings(DetectionSettings):
    """Settings of an analysis: what is examined, and what is drawn."""

    resize: Resize = Field(
        "short",
        description="short: shorter side to the image size, shape kept; square: the same, then centre crop; none.",
    )
    max_tokens: int | None = Field(
        None,
        ge=25,
        description="Scale down images with more patch tokens than this, shape kept: time grows with the square"
        " of the number. Default: 4 x the tokens of a square of the image size (shapes up to 4:1 stay as they are), or"
        " 2048 if that is more; with --resize none, no limit.",
    )
    limit: int | None = Field(
        None, ge=1, le=MOST, description="Use only this many images, chosen at random (--seed); default: all."
    )
    norm_threshold: float | None = Field(
        None, gt=0, description="Mark tokens above this norm too, and take the observed direction from them."
    )
    blocks: Blocks | None = Field(
        None,
        description="Blocks whose angles and masks are shown, such as 9,19,29,39, or all; default: four, evenly"
        " spread.",
    )
    figures: Figures = Field(8, description="Number of images to show in figures, evenly spread, or all; needs --out.")
    exclude_masked: bool = Field(False, description="Leave marked tokens out of the basis of the PCA pictures.")
    clamp: int | None = Field(
        None, ge=1, le=MOST, description="Compare with a copy whose singular values are limited to its K-th largest."
    )
    inpaint: bool = Field(
        True,
        description="Compare with the inpainted original: what a repair could change; images with outlying tokens are"
        " run a second time.",
    )
    method: Literal["none", "inpaint"] = Field(
        "none",
        description="inpaint: compare with, and take --features from, the pass in which outlying tokens are replaced.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> AnalyzeSettings:
        if self.resize == "none" and self.image_size is not None:
            raise ValueError("resize none leaves every image its size: give no image_size")
        if self.resize == "square" and self.max_tokens is not None:
            raise ValueError("resize square has the tokens of its image_size: give no max_tokens")
        if self.method != "none" and self.clamp is not None:
            raise ValueError(f"one comparison at a time: give method {self.method} or clamp")
        return self
