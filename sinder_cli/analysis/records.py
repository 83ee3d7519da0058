"""Records of `sinder analyze`: frozen, and at the same time the schema of its JSON document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sinder_cli.defects.settings import RISE, Stage

TAPPED = "residual stream after each block, before the final norm"

Rule = Literal["equation_5", "outlying", "above_threshold"]
VerdictKind = Literal["broken", "defects", "unpredicted", "aligned", "none"]
Gain = Literal["healthy", "none", "marked", "features"]


class Record(BaseModel):
    """A frozen record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Distribution(Record):
    """Summary of many numbers; quantiles to 0.2 % (norms), 0.05° (angles), 0.0005 (cosines; inpainted 0.00005)."""

    count: int = Field(description="Number of values.")
    mean: float = Field(description="Mean.")
    min: float = Field(description="Smallest.")
    p01: float = Field(description="1st percentile.")
    median: float = Field(description="Median.")
    p99: float = Field(description="99th percentile.")
    max: float = Field(description="Largest.")


class Position(Record):
    """A place of the patch grid at which tokens were marked."""

    row: int = Field(description="Row of the grid, 0 at the top.")
    column: int = Field(description="Column of the grid, 0 at the left.")
    share: float = Field(description="Marked tokens ÷ all tokens there, over the images.")


class Marked(Record):
    """The patch tokens that one rule marks in one block."""

    tokens: int = Field(description="Number of tokens, over all images.")
    share: float = Field(description="Marked tokens ÷ all patch tokens.")
    images: int = Field(description="Number of images with at least `min_tokens` of them.")
    positions: tuple[Position, ...] = Field(description="Places where they lie most often, at most 20.")


class Observed(Record):
    """Direction that one block's outlying tokens share: the leading right singular vector of their unit vectors."""

    tokens: int = Field(description="Number of outlying tokens that it was computed from.")
    images: int = Field(description="Number of images with these tokens.")
    explained: float = Field(description="Mean cos² between those tokens and the direction: its explained variance.")
    spread_within_deg: float | None = Field(
        description="RMS angle between a token and the direction of its own image, for images with two or more."
    )
    spread_across_deg: float | None = Field(description="RMS angle between the directions of two images, all pairs.")
    angle_to_predicted_deg: dict[Stage, float] = Field(
        description="Angle to the direction predicted from the weights, by stage (the paper's figure 2)."
    )


class BlockRecord(Record):
    """The residual stream after one block, over all images."""

    block: int = Field(description="Number of the block, from 0.")
    patch_norm: Distribution | None = Field(description="Norms of patch tokens; null if none is finite.")
    cls_norm: Distribution | None = Field(description="Norms of the cls token.")
    register_norm: Distribution | None = Field(description="Norms of register tokens.")
    nonfinite: int = Field(description="Patch tokens with a NaN or an infinity.")
    gap: dict[Stage, float] = Field(description="σ₁/σ₂ of the predicted direction, by stage; at most 1e12.")
    determined: bool = Field(description="True if σ₁/σ₂ of the cumulative stage reaches `min_gap`.")
    angle_deg: dict[Stage, Distribution | None] = Field(
        description="Angles between patch tokens and the predicted direction, by stage, 0 to 90°."
    )
    marked: dict[Rule, Marked | None] = Field(
        description="Tokens by rule. `equation_5`: marked by equation (5) with the cumulative direction (null if it is "
        "not determined). `outlying`: norm above `norm_factor` (3 if that is 0) × the image's median, and this ratio "
        f"above {RISE} × its value at the embedding. `above_threshold`: norm above `norm_threshold` (null without one)."
    )
    agreement: dict[str, float | None] = Field(
        description="Intersection over union of two rules' tokens, by names such as `equation_5/outlying`; null if "
        "neither rule marks any; rules that do not apply are left out."
    )
    observed: Observed | None = Field(description="The shared direction of outlying tokens; null without any.")


class Verdict(Record):
    """The conclusion from the numbers."""

    kind: VerdictKind = Field(
        description="`broken`: tokens that are not finite; "
        "`defects`: outlying tokens that the weights predict; `unpredicted`: outlying tokens that they do "
        "not; `aligned`: equation (5) marks tokens, none of outlying norm; `none`: none of these; the sentence then "
        "begins with `healthy` if no token is outlying in any block."
    )
    first_block: int | None = Field(description="The first block that shows them.")
    sentence: str = Field(description="The verdict in words.")
    confidence: str = Field(description="How sure it is, and why.")
    tokens: int = Field(0, description="Number of tokens that it is based on, at the block that has most.")
    gap: float | None = Field(None, description="σ₁/σ₂ of the predicted direction that it is based on.")
    angle_to_predicted_deg: float | None = Field(None, description="Angle between the observed and that predicted one.")
    block: int | None = Field(
        None,
        description="The block to look at: `defects`: where the observed direction is nearest to the predicted one; "
        "`unpredicted`, `aligned`: where most tokens are marked; null otherwise.",
    )

    @property
    def fails(self) -> bool:
        """True if `--fail-on-defects` fails: for tokens that stand out, predicted or not, or are not finite."""
        return self.kind in ("broken", "defects", "unpredicted")


class ImageInpainting(Record):
    """One image with outlying tokens, compared with its inpainted original after the last block."""

    image: str = Field(description="Name of the image.")
    tokens: int = Field(description="Number of patch tokens outlying in some block by the rule of `mark`.")
    max_ratio: float = Field(description="The largest norm of a patch token ÷ the median of the image, in any block.")
    block: int = Field(description="The block of that token.")
    cls_cosine: float | None = Field(description="Cosine of cls to that of the inpainted original; null without cls.")
    good_cosine: float | None = Field(description="Median cosine of patch tokens that are outlying in no block.")
    marked_cosine: float | None = Field(description="Mean cosine of patch tokens that are outlying in some block.")


class Inpainting(Record):
    """The last block's tokens, before the final norm, against the inpainted original: what a repair could change."""

    gain: Gain | None = Field(
        description="`healthy`: no token is outlying in any block by the rule of `mark`, a repair would train nothing; "
        "`none`: there are outlying tokens, but they change little: the 1st percentiles of `cls_cosine` and"
        " `good_cosine` and the median of `marked_cosine` reach 0.999; `marked`: only the last of these does not, so"
        " a repair could change only outlying tokens; `features`: a repair could change cls or good tokens; null if"
        " tokens are not finite."
    )
    sentence: str = Field(description="The gain in words.")
    tokens: int = Field(description="Number of patch tokens outlying in some block by the rule of `mark`.")
    unmarked: int = Field(
        description="Number of patch tokens that stand out by norm in some block, but that `mark` does not mark."
    )
    images: int = Field(
        description="Number of images with outlying tokens; only these are run again, as all others stay the same."
    )
    replaced: int = Field(description="Number of patch tokens that the inpainted pass replaces in some block.")
    cls_cosine: Distribution | None = Field(
        description="Cosine of cls, all images; null without cls. Outlying tokens may carry information, on CLIP-like "
        "models above all: a cls that moves far is no success by itself, and must be tested on a task."
    )
    good_cosine: Distribution | None = Field(description="Cosine of patch tokens outlying in no block, all images.")
    marked_cosine: Distribution | None = Field(description="Cosine of patch tokens outlying in some block.")
    by_image: tuple[ImageInpainting, ...] = Field(
        description="Images that have outlying tokens, by name; of more than 1000, those whose cls moves furthest."
    )


class Side(Record):
    """One backbone over the images."""

    model: str = Field(description="Name of the model.")
    weights: str = Field(description="Where its weights came from.")
    fingerprint: str = Field(description="SHA-256 of its weights.")
    verdict: Verdict
    blocks: tuple[BlockRecord, ...]
    inpainting: Inpainting | None = Field(
        None,
        description="What a repair could change, estimated by the inpainted original: the pass in which each outlying "
        "patch token is replaced, at the block where it appears, by the average of its unmarked neighbours. Null with "
        "--no-inpaint, and for a side that is inpainted itself.",
    )


class PairRecord(Record):
    """The same block of two backbones on the same images."""

    block: int = Field(description="Number of the block, from 0.")
    patch_cosine: Distribution | None = Field(description="Cosine between the two patch tokens at one place.")
    cls_cosine: Distribution | None = Field(description="Cosine between the two cls tokens; null without cls.")
    agreement: dict[Rule, float | None] = Field(
        description="Intersection over union of both sides' tokens, by rule; without rules that do not apply to both."
    )


class FigureFile(Record):
    """One picture that was written."""

    file: str = Field(description="Path inside the output folder.")
    caption: str = Field(description="What it shows and how it was made.")


class Analysis(Side):
    """The whole document; the fields of the first backbone are at its top level."""

    schema_version: Literal[2] = Field(2, description="Version of this schema.")
    sinder: str = Field(description="Version of the program.")
    tapped: str = Field(TAPPED, description="Where tokens are taken from.")
    images: int = Field(description="Number of images that were run.")
    skipped: dict[str, str] = Field(description="Images that could not be decoded, with the reason.")
    grid: tuple[int, int] = Field(
        description="Rows and columns of the grid that positions refer to; a token of an image with another shape "
        "counts at its place relative to the image."
    )
    settings: dict[str, Any] = Field(
        description="Resolved settings, by the names of the options with underscores; image_size is null if images "
        "were not resized."
    )
    figures: tuple[FigureFile, ...] = Field((), description="Pictures written beside this document.")
    other: Side | None = Field(None, description="The second backbone of a comparison.")
    comparison: tuple[PairRecord, ...] | None = Field(None, description="Both sides, block by block.")
