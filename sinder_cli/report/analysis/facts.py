"""Words, numbers and table rows that the page of an analysis shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath
from typing import NamedTuple

from sinder_cli.analysis.records import (
    Analysis,
    BlockRecord,
    Distribution,
    ImageInpainting,
    Inpainting,
    Marked,
    Rule,
    Side,
    VerdictKind,
)
from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.defects.settings import NORM_FACTOR
from sinder_cli.escaping import printable
from sinder_cli.report import formatting
from sinder_cli.report.formatting import NOTHING, Named, counted, degrees, number, percent

COLOUR_OF: dict[VerdictKind, str] = {
    "broken": "broken",
    "defects": "open",
    "unpredicted": "open",
    "aligned": "none",
    "none": "good",
}
SIDES = ("first", "second")  # of a comparison whose sides nothing else tells apart
RUN_WEIGHTS = "model.safetensors"  # what the weights of a run are called: its folder names them
SHOWN_IMAGES = 10  # at most, those that outlying tokens move furthest


class Measure(NamedTuple):
    """One row of a table, with one value per side."""

    name: str
    values: list[str]


class Cell(NamedTuple):
    """A value in a table, and the heading of its column."""

    heading: str
    value: str


class BlockRow(NamedTuple):
    """One block of one side, by its short name; its row is dimmed if the predicted direction is not determined."""

    block: int
    side: str
    determined: bool
    cells: list[Cell]


class Columns(NamedTuple):
    """Optional columns of the table of blocks: True for those that it has."""

    broken: bool
    threshold: bool
    cls: bool
    registers: bool


def sides_of(analysis: Analysis) -> list[Side]:
    """Return the one backbone, or the two of a comparison."""
    return [analysis, *([analysis.other] if analysis.other else [])]


def short_names(analysis: Analysis) -> list[str]:
    """Return a short name per side, for columns: its model, its run or file of weights, or the side."""
    sides = sides_of(analysis)
    for names in ([side.model for side in sides], [short_weights(side.weights) for side in sides]):
        if len(set(names)) == len(sides):
            return [printable(name) for name in names]
    return list(SIDES[: len(sides)])


def short_weights(label: str) -> str:
    """Return the name of the file that weights came from, or of the run whose they are."""
    path = PurePath(label)
    return path.parent.name if path.name == RUN_WEIGHTS and path.parent.name else path.stem


def labels_of(analysis: Analysis) -> list[str]:
    """Return one label per side: its model.

    If both sides have the same model, the labels name the weights too; if these are also the same, the side.
    """
    sides = sides_of(analysis)
    for labels in ([side.model for side in sides], [f"{side.model}, {side.weights}" for side in sides]):
        if len(set(labels)) == len(sides):
            return [printable(label) for label in labels]
    return [printable(f"{side.model}, {name}") for side, name in zip(sides, SIDES, strict=False)]


def side_names(analysis: Analysis) -> list[Named]:
    """Return model and weights of both sides by their short names; an empty list for a single backbone."""
    sides = sides_of(analysis)
    names = short_names(analysis) if len(sides) == 2 else ()
    return [
        Named(name, printable(side.weights if name == printable(side.model) else f"{side.model}, {side.weights}"))
        for name, side in zip(names, sides, strict=False)
    ]


def has_broken_tokens(analysis: Analysis) -> bool:
    """Return True if any block has tokens that are not finite."""
    return any(block.nonfinite for side in sides_of(analysis) for block in side.blocks)


def norm_factor(analysis: Analysis) -> str:
    """Return the multiple of the median above which a norm is outlying."""
    return f"{analysis.settings.get('norm_factor') or NORM_FACTOR:g}"


def rule_words(analysis: Analysis) -> dict[Rule, str]:
    """Return the rules that mark tokens, each in a few words."""
    threshold = analysis.settings.get("norm_threshold")
    words: dict[Rule, str] = {"equation_5": "equation (5)", "outlying": f"norm > {norm_factor(analysis)} × median"}
    return words if threshold is None else words | {"above_threshold": f"norm > {number(threshold)}"}


def key_measures(analysis: Analysis) -> list[Measure]:
    """Return the most important numbers of each side, all from the block that its verdict is about."""
    sides = sides_of(analysis)
    broken = has_broken_tokens(analysis)
    at_least = analysis.settings["min_tokens"]

    def row(name: str, say: Callable[[BlockRecord], str]) -> Measure:
        return Measure(name, [say(told_block(side)) for side in sides])

    rows = [
        Measure("Seen from block", [_whole(side.verdict.first_block) for side in sides]),
        Measure("All below at block", [_whole_block(side) for side in sides]),
        *([row("Tokens not finite", lambda block: f"{block.nonfinite:,}")] if broken else []),
        row("Outlying tokens", lambda block: _marked(block.marked["outlying"])),
        row(f"Images with {at_least} or more of them", lambda block: _images(block.marked["outlying"])),
        row("Marked by equation (5)", lambda block: _marked(block.marked["equation_5"])),
        row("Median norm", lambda block: _of(block.patch_norm, "median")),
        row("Largest norm", lambda block: _of(block.patch_norm, "max")),
        row("Norm of cls, median", lambda block: _of(block.cls_norm, "median")),
        row("Norm of registers, median", lambda block: _of(block.register_norm, "median")),
        row("Observed to predicted direction", _angle),
        row("σ₁/σ₂ of the predicted direction", lambda block: number(block.gap["cumulative"])),
    ]
    return [measure for measure in rows if set(measure.values) != {NOTHING}]


def told_block(side: Side) -> BlockRecord:
    """Return the block that a verdict is about: the one that it names, else the last."""
    return side.blocks[-1 if side.verdict.block is None else side.verdict.block]


def _whole_block(side: Side) -> str:
    block = told_block(side).block
    return f"{block}, the last" if block == len(side.blocks) - 1 else str(block)


def block_rows(analysis: Analysis) -> list[list[BlockRow]]:
    """Return the rows of the table of blocks: for each block, one row per side."""
    sides, factor = sides_of(analysis), norm_factor(analysis)
    shown = Columns(
        broken=has_broken_tokens(analysis),
        threshold="above_threshold" in rule_words(analysis),
        cls=any(block.cls_norm for side in sides for block in side.blocks),
        registers=any(block.register_norm for side in sides for block in side.blocks),
    )
    names = short_names(analysis)
    return [
        [
            BlockRow(at, name, block.determined, _cells(block, shown, factor))
            for name, block in zip(names, blocks, strict=True)
        ]
        for at, blocks in enumerate(zip(*(side.blocks for side in sides), strict=True))
    ]


def gain_sentences(analysis: Analysis) -> list[Named]:
    """Return in words what a repair of each side could change; nothing for a side without that comparison."""
    sides = zip(labels_of(analysis), sides_of(analysis), strict=True)
    return [Named(label, side.inpainting.sentence) for label, side in sides if side.inpainting]


def gain_measures(analysis: Analysis) -> list[Measure]:
    """Return the comparison of the last block with the inpainted original, one value per side."""
    found = [side.inpainting for side in sides_of(analysis)]

    def row(name: str, say: Callable[[Inpainting], str]) -> Measure:
        return Measure(name, [NOTHING if each is None else say(each) for each in found])

    rows = [
        row("Tokens outlying in some block", lambda each: f"{each.tokens:,}"),
        row("Images with such tokens", lambda each: f"{each.images:,}"),
        row("Tokens that the inpainted pass replaces", lambda each: f"{each.replaced:,}"),
        row("Cosine of cls, mean", lambda each: _fine(each.cls_cosine, "mean")),
        row("Cosine of cls, 1 %", lambda each: _fine(each.cls_cosine, "p01")),
        row("Cosine of good tokens, median", lambda each: _fine(each.good_cosine, "median")),
        row("Cosine of good tokens, 1 %", lambda each: _fine(each.good_cosine, "p01")),
        row("Cosine of marked patches, mean", lambda each: _fine(each.marked_cosine, "mean")),
    ]
    return [measure for measure in rows if set(measure.values) != {NOTHING}]


def gain_images(analysis: Analysis) -> list[list[Cell]]:
    """Return the images that outlying tokens move furthest: those of the first side, then those of the second."""
    return [
        [
            Cell("image", printable(PurePath(image.image).name)),
            *([Cell("side", name)] if analysis.other else []),
            Cell("tokens", f"{image.tokens:,}"),
            Cell("largest norm ÷ median", number(image.max_ratio)),
            Cell("at block", str(image.block)),
            Cell("cls", _four(image.cls_cosine)),
            Cell("good tokens", _four(image.good_cosine)),
            Cell("marked", _four(image.marked_cosine)),
        ]
        for side, name in zip(sides_of(analysis), short_names(analysis), strict=True)
        for image in sorted(side.inpainting.by_image if side.inpainting else (), key=_moved_least)[:SHOWN_IMAGES]
    ]


def _moved_least(image: ImageInpainting) -> float:
    known = (each for each in (image.cls_cosine, image.good_cosine) if each is not None)
    return next(known, 1.0)


def _four(cosine: float | None) -> str:
    return NOTHING if cosine is None else f"{cosine:.4f}"


def _fine(distribution: Distribution | None, name: str) -> str:
    return _four(None if distribution is None else getattr(distribution, name))


def _cells(block: BlockRecord, shown: Columns, factor: str) -> list[Cell]:
    observed = block.observed
    return [  # what a phone shows without scrolling comes first
        *([Cell("not finite", f"{block.nonfinite:,}")] if shown.broken else []),
        Cell("median norm", _of(block.patch_norm, "median")),
        Cell("largest norm", _of(block.patch_norm, "max")),
        Cell(f"> {factor} × median", _tokens(block.marked["outlying"])),
        Cell("eq. (5) tokens", _tokens(block.marked["equation_5"])),
        Cell("observed to ν", _angle(block)),
        Cell("σ₁/σ₂", number(block.gap["cumulative"])),
        *([Cell("> threshold", _tokens(block.marked["above_threshold"]))] if shown.threshold else []),
        Cell("agreement", _share(block.agreement.get("equation_5/outlying"))),
        Cell("spread within", degrees(observed.spread_within_deg if observed else None)),
        Cell("spread across", degrees(observed.spread_across_deg if observed else None)),
        Cell("99 % norm", _of(block.patch_norm, "p99")),
        *([Cell("cls norm", _of(block.cls_norm, "median"))] if shown.cls else []),
        *([Cell("register norm", _of(block.register_norm, "median"))] if shown.registers else []),
    ]


def pair_rows(analysis: Analysis) -> list[list[Cell]]:
    """Return one row per block that compares both sides."""
    return [
        [
            Cell("block", str(pair.block)),
            Cell("patch cosine, median", _cosine(pair.patch_cosine, "median")),
            Cell("1 %", _cosine(pair.patch_cosine, "p01")),
            Cell("99 %", _cosine(pair.patch_cosine, "p99")),
            Cell("cls cosine, median", _cosine(pair.cls_cosine, "median")),
            *(
                Cell(f"same tokens, {words}", _share(pair.agreement.get(rule)))
                for rule, words in rule_words(analysis).items()
            ),
        ]
        for pair in analysis.comparison or ()
    ]


def setting_rows(analysis: Analysis) -> list[Named]:
    """Return the settings in force, each with its help text."""
    return formatting.setting_rows(AnalyzeSettings, analysis.settings)


def origin_rows(analysis: Analysis) -> list[Named]:
    """Return what was run: models, weights, images and the version of the program."""
    sides = sides_of(analysis)
    order = ("",) if len(sides) == 1 else tuple(f", {name}" for name in short_names(analysis))
    models = [
        row
        for side, which in zip(sides, order, strict=True)
        for row in (
            Named(f"Model{which}", side.model),
            Named(f"Weights{which}", side.weights),
            Named(f"Fingerprint of the weights{which}", side.fingerprint),
        )
    ]
    return [
        *models,
        Named("Images", f"{analysis.images:,}"),
        Named("Images skipped", f"{len(analysis.skipped):,}"),
        Named("Tokens from", analysis.tapped),
        Named("sinder version", analysis.sinder),
    ]


def images_sentence(analysis: Analysis) -> str:
    """Return the number of images in words: 64 images, 2 skipped."""
    skipped = f", {len(analysis.skipped):,} skipped" if analysis.skipped else ""
    return counted(analysis.images, "image") + skipped


def _of(distribution: Distribution | None, name: str) -> str:
    return NOTHING if distribution is None else number(getattr(distribution, name))


def _cosine(distribution: Distribution | None, name: str) -> str:
    return NOTHING if distribution is None else f"{getattr(distribution, name):.3f}"


def _marked(marked: Marked | None) -> str:
    return NOTHING if marked is None else f"{marked.tokens:,} ({percent(marked.share)})"


def _tokens(marked: Marked | None) -> str:
    return NOTHING if marked is None else f"{marked.tokens:,}"


def _images(marked: Marked | None) -> str:
    return NOTHING if marked is None else f"{marked.images:,}"


def _angle(block: BlockRecord) -> str:
    return degrees(block.observed.angle_to_predicted_deg["cumulative"] if block.observed else None)


def _share(value: float | None) -> str:
    return NOTHING if value is None else percent(value)


def _whole(value: int | None) -> str:
    return NOTHING if value is None else str(value)
