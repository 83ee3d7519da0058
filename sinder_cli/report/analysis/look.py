"""A look at a few photographs: five lines that answer whether a model has defects, and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.analysis.gain import AS_GOOD_AS_ONE, SAME, angle_of, moves, moves_far
from sinder_cli.errors import SinderError
from sinder_cli.escaping import printable
from sinder_cli.notebooks import Shown
from sinder_cli.repairing.folder import RunFolder
from sinder_cli.report.analysis.facts import short_weights, told_block
from sinder_cli.report.analysis.image_maps import drawn_image, paint_image, shared_scales
from sinder_cli.report.drawing.pictures import LabelledPicture
from sinder_cli.report.drawing.rows import Row, below_each_other, draw_rows
from sinder_cli.report.drawing.scales import COSINES, norm_scale
from sinder_cli.report.formatting import counted, number

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.analysis.records import Inpainting, Side
    from sinder_cli.analysis.run import AnalysisResult
    from sinder_cli.report.analysis.image_maps import DrawnImage
    from sinder_cli.report.drawing.pictures import Picture
    from sinder_cli.report.drawing.scales import ColourScale

CAPTION = (
    "Each row: the photograph as the model saw it; norms of its patch tokens after the last block, before the final"
    " norm, on a logarithmic scale, on which bright stands out; their first three principal components as colours,"
    " each model's own; cosine of each token to the direction that the weights predict, 0 to 1, at the block that is"
    " named; attention of cls in the last block, mean over heads, each map from its own smallest to its own largest"
    " weight."
)


@dataclass(frozen=True)
class Answer:
    """What one model does with the photographs, in a title and at most four lines, and whether to repair it."""

    model: str
    title: str
    lines: tuple[str, ...]
    repair: bool  # True if a repair could change something
    fails: bool  # as `--fail-on-defects` means it
    skipped: tuple[str, ...] = ()  # photographs that could not be read


@dataclass(frozen=True)
class Look(Shown):
    """The answers of all models, one picture with a row per model and photograph, and what the picture shows."""

    answers: tuple[Answer, ...]
    picture: Picture  # [H, W, 3]
    caption: str = CAPTION


def look_of(results: Sequence[AnalysisResult]) -> Look:
    """Return the look at analyses of single backbones, whose portraits have the maps of all blocks; draws them."""
    names = _names([result.analysis for result in results])
    spreads = [result.analysis.blocks[-1].patch_norm for result in results]
    alike = len({result.predictions[0].width for result in results}) == 1
    block = next((each.analysis.verdict.block for each in results if each.analysis.verdict.block is not None), None)
    norms = norm_scale(spreads) if alike else None
    rows = [row for name, result in zip(names, results, strict=True) for row in _rows(name, result, block, norms)]
    pictures = [draw_rows([row]) for row in rows]
    answers = tuple(answer_of(name, result) for name, result in zip(names, results, strict=True))
    return Look(answers, below_each_other(pictures))


def _names(sides: Sequence[Side]) -> list[str]:
    """Return what to call each model: by its name and run, and by its weights where several have the same name."""
    names = [_name(side) for side in sides]
    return [
        printable(name if names.count(name) == 1 else f"{side.model} ({_weights(side)})")
        for name, side in zip(names, sides, strict=True)
    ]


def _name(side: Side) -> str:
    return f"{side.model} (run {Path(side.weights).parent.name})" if _is_of_a_run(side) else side.model


def _weights(side: Side) -> str:
    return f"run {Path(side.weights).parent}" if _is_of_a_run(side) else short_weights(side.weights)


def _is_of_a_run(side: Side) -> bool:
    """Return True if the weights are those that a run left in its folder."""
    run = RunFolder(Path(side.weights).parent)
    with suppress(SinderError, OSError, ValueError):  # a label may be anything, and its folder may have gone
        return Path(side.weights) == run.model and run.is_run
    return False


def answer_of(name: str, result: AnalysisResult) -> Answer:
    """Return in words what stands out, whether the weights predict it, what it spoils, and whether to repair."""
    side = result.analysis
    gain = side.inpainting.gain if side.inpainting else None
    lines = [_what(side), _why(side), *(_gain_words(side.inpainting, side.images) if side.inpainting else [])]
    skipped = f", {len(side.skipped):,} skipped" if side.skipped else ""
    title = f"{name}, {counted(side.images, 'photograph')}{skipped}"
    repair = gain in ("features", "marked")
    return Answer(side.model, title, tuple(lines), repair, side.verdict.fails, tuple(side.skipped))


def _what(side: Side) -> str:
    verdict, last = side.verdict, side.blocks[-1].patch_norm
    if verdict.kind == "aligned":
        along = f"{verdict.tokens:,} tokens lie along the predicted direction"
        return f"No norm stands out, but {along}, from block {verdict.first_block} on{_largest(side)}."
    if verdict.kind not in ("defects", "unpredicted"):
        brief = verdict.kind == "none" and not verdict.sentence.startswith("healthy")  # a long one, with numbers
        return f"{verdict.sentence[:1].upper()}{verdict.sentence[1:].rstrip('.')}{_largest(side, brief)}."
    seen = f" of {last.count:,} patch" if last else ""
    return f"{verdict.tokens:,}{seen} tokens stand out, from block {verdict.first_block} on{_largest(side)}."


def _largest(side: Side, brief: bool = False) -> str:
    """Return the largest norm as a multiple of the median of the photograph, or of all where no photograph is known."""
    by_image = [(image.max_ratio, image.block) for image in (side.inpainting.by_image if side.inpainting else ())]
    norms = [(block.patch_norm, block.block) for block in side.blocks if block.patch_norm and not block.nonfinite]
    known = by_image or [(norm.max / norm.median, block) for norm, block in norms if norm.median]
    if not known:
        return ""
    ratio, block = max(known)
    if brief:
        return f"; up to {number(ratio)} ×, block {block}"
    return f"; the largest norm is {number(ratio)} × the median, at block {block}"


def _why(side: Side) -> str:
    verdict = side.verdict
    if verdict.kind != "defects" or verdict.gap is None:
        return verdict.confidence
    return (
        f"The weights predict them: {verdict.angle_to_predicted_deg:.1f}° from the predicted direction at block"
        f" {verdict.block}, σ₁/σ₂ {number(verdict.gap)}."
    )


def _gain_words(inpainting: Inpainting, photographs: int) -> list[str]:
    """Return how far tokens would move without the outlying ones, and last whether to repair."""
    if inpainting.gain is None:
        return ["Repair: no. Tokens are not finite, so what it could change cannot be determined."]
    if inpainting.gain == "healthy":
        return [_nothing_to_train_on(inpainting.unmarked)]
    found, cls = f"{inpainting.tokens:,}", inpainting.cls_cosine
    if photographs > 1:
        found += f" in {inpainting.images:,} of {photographs:,} photographs"
    moved = moves(cls, inpainting.good_cosine, inpainting.marked_cosine, _moved)
    least = angle_of(SAME)
    repair = {
        "features": "Repair: yes, on many photographs; then sinder evaluate tells whether it helps.",
        "marked": f"Repair: it would help little, nearly all others move by under {least}; on many photographs:",
        "none": f"Repair: no. On these photographs nothing would move by more than {least}.",
    }[inpainting.gain]
    if inpainting.gain == "features" and moves_far(cls):
        repair = (
            "Repair: yes, on many photographs; but cls moves far, and outliers may carry information: sinder"
            " evaluate tells whether it helps."
        )
    return [f"Without its outlying tokens ({found}) {moved}.", repair]


def _nothing_to_train_on(unmarked: int) -> str:
    if unmarked:
        stand = f"Stand out by norm: {unmarked:,}, none certain to be a defect"
        return f"Repair: no. {stand} (--mark norm marks them all)."
    return "Repair: no, these photographs show nothing to train on; others may."


def _moved(cosine: float, lowest: float) -> str:
    """Return 5.7°, 1 % over 14°; without the latter where it is practically none."""
    return angle_of(cosine) + (f" (1 % over {angle_of(lowest)})" if lowest < AS_GOOD_AS_ONE else "")


def _rows(name: str, result: AnalysisResult, told: int | None, shared: ColourScale | None) -> list[Row]:
    """Return a row per photograph; cosines are those at the block `told` of all models, if this one has it.

    Norms have the scale that is `shared` by models of one width, if there is one.
    """
    analysis = result.analysis
    images = [drawn_image(portrait, result.mean, result.std) for portrait in result.portraits]
    scales = shared_scales(analysis, images)
    last = len(analysis.blocks) - 1
    block = told if told is not None and told <= last else told_block(analysis).block
    norms = shared or scales.norms[-1]
    scales = replace(scales, norms=(*scales.norms[:-1], norms))
    rows = []
    for image in images:
        maps = paint_image(image, scales, [""])
        side = maps.sides[0]
        shown = [
            maps.photograph._replace(label="photograph"),
            side.norm._replace(label=f"norm, block {last}: {number(norms.low, 3)} to {number(norms.high, 3)}"),
            side.pca._replace(label=f"PCA, block {last}"),
            _cosines(image, block),
            *([side.attention._replace(label="attention of cls")] if side.attention else []),
        ]
        rows.append(Row(_heading(name, image), shown))
    return rows


def _cosines(image: DrawnImage, block: int) -> LabelledPicture:
    degrees: Tensor | None = image.sides[0].angles.get(block)
    label = f"|cos| to ν, block {block}"
    if degrees is None:
        return LabelledPicture(label, f"Block {block}: not drawn", None)
    cosines = degrees.double().deg2rad().cos()
    alt = f"Cosines of the tokens of {image.name} to the predicted direction at block {block}"
    return LabelledPicture(label, alt, COSINES.paint(cosines))


def _heading(name: str, image: DrawnImage) -> str:
    inpainted = image.sides[0].inpainted
    outlying = f", {counted(int(inpainted.marked.sum()), 'token')} outlying in some block" if inpainted else ""
    return f"{name}: {image.name}{outlying}; norms: bright stands out (log scale)"
