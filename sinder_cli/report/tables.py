"""Results as terminal tables, readable at 80 columns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sinder_cli.defects.settings import MIN_GAP
from sinder_cli.escaping import printable
from sinder_cli.evaluation.sentences import headline
from sinder_cli.report.analysis.facts import labels_of, norm_factor, short_names, sides_of
from sinder_cli.report.formatting import Named, counted, degrees, duration
from sinder_cli.report.listings import plain_table
from sinder_cli.report.repair import facts

if TYPE_CHECKING:
    from sinder_cli.analysis.records import Analysis, Distribution, Marked, Side
    from sinder_cli.conformance.subject import Conformance
    from sinder_cli.defects.prediction import BlockSpectrum, PositionCheck, Prediction
    from sinder_cli.evaluation.records import Evaluation, ValueRecord
    from sinder_cli.exporting.drafts import ExportResult
    from sinder_cli.repairing.dry_run import DryRun, DryStep

SIDE_LETTERS = 9  # of a side's name in a heading: 80 columns hold no more
BARS = "▁▂▃▄▅▆▇█"
FLAT = 0.05  # logarithmic range, 5 %, below which all bars have the same height
OUTCOMES = {"passed": "green", "failed": "red", "not given": "yellow", "not run": "dim"}  # of a check, as a style
VERDICTS = {"good": "green", "open": "yellow", "bad": "red", "none": ""}  # of a repair, as a style
HEADINGS = {"attention": "attn", "mlp": "mlp", "block": "block", "cumulative": "cumul"}  # 80 columns hold no more


def prediction_table(prediction: Prediction) -> RenderableType:
    """Return σ₁, σ₁/σ₂ and the turn from the previous block, for each stage of each block."""
    table = plain_table(prediction.model)
    table.padding = (0, 1, 0, 0)  # one space between columns: two would not fit
    table.add_column("", justify="right")
    for stage in prediction.stages:
        table.add_column(f"{HEADINGS[stage]}\nσ₁", justify="right")
        table.add_column("\nσ₁/σ₂", justify="right")
        table.add_column("\nturn", justify="right")
    for rows in zip(*prediction.stages.values(), strict=True):
        cells = [cell for row in rows for cell in _spectrum_cells(row)]
        table.add_row(str(rows[0].block), *cells)
    return Group(table, *_prediction_words(prediction))


def _spectrum_cells(row: BlockSpectrum) -> list[Text]:
    dim = "" if row.pair.gap >= MIN_GAP else "dim"
    gap = f"{row.pair.gap:.2f}" if row.pair.gap < 100 else _short(row.pair.gap)
    cells = (_short(row.sigma), gap, degrees(row.angle_to_previous, ""))
    return [Text(cell, dim) for cell in cells]


def _prediction_words(prediction: Prediction) -> list[str]:
    words = []
    if "cumulative" in prediction.stages:
        settled = prediction.settled_from()
        words.append(
            f"The leading direction has settled from block {settled} on; sinder analyze shows whether tokens take it."
            if settled is not None
            else f"The leading direction does not settle: σ₁/σ₂ < {MIN_GAP}, or it keeps turning by over 5° per block."
        )
    words.append(f"turn: angle to the previous block's direction; dim: σ₁/σ₂ < {MIN_GAP}, direction not determined.")
    if prediction.position is not None:
        words.append(_position_words(prediction.position))
    return words


def _position_words(check: PositionCheck) -> str:
    if not check.outliers:
        return (
            f"Position embedding: no outlying patch among {check.patches}"
            f" (norm {check.median_norm:.3g}, at most {check.max_norm:.3g})."
        )
    worst = max(check.outliers, key=lambda outlier: outlier.norm)
    return (
        f"Position embedding: {len(check.outliers)} of {check.patches} patches stand out, patch {worst.patch} most:"
        f" norm {worst.norm:.3g} against {check.median_norm:.3g}, {worst.share:.0%} of its square in one dimension,"
        f" {worst.dimension}."
    )


def analysis_table(analysis: Analysis, folder: Path | None = None, features: Path | None = None) -> RenderableType:
    """Return the blocks in numbers and at a glance, the verdict, what a repair could change, and where files are."""
    factor = norm_factor(analysis)
    parts: list[RenderableType] = [_analysis_title(analysis), _side_table(analysis, factor)]
    parts.append(_sparkline_words(analysis))
    if analysis.other and analysis.comparison:
        parts += ["", f"Against {analysis.other.model} ({analysis.other.weights}):"]
        parts += [_comparison_table(analysis, analysis.other, factor), _sparkline_words(analysis.other)]
    for name, side in zip(labels_of(analysis), sides_of(analysis), strict=True):
        parts += ["", *_verdict_words(name, side)]
    if folder:
        parts.append(
            f"report: {printable(str(folder / 'report.html'))}, {counted(len(analysis.figures), 'figure')} beside it"
        )
    if features:
        parts.append(f"features: {printable(str(features))}, {counted(analysis.images, 'file')}")
    return Group(*parts)


def _analysis_title(analysis: Analysis) -> str:
    skipped = f", {len(analysis.skipped):,} skipped" if analysis.skipped else ""
    return f"{analysis.model}, {counted(analysis.images, 'image')}{skipped}; norms before the final norm"


def _verdict_words(model: str, side: Side) -> list[str]:
    words = [f"{model}: {side.verdict.sentence}", side.verdict.confidence]
    gain = side.inpainting
    if gain is None or (side.verdict.kind == "none" and gain.gain == "healthy" and not gain.unmarked):
        return words  # the verdict has said so
    return [*words, gain.sentence]


def _side_table(side: Side, factor: str) -> Table:
    """Return one row per block: norms of patch tokens, marked tokens, observed against predicted direction."""
    table = plain_table("")
    table.padding = (0, 1, 0, 0)
    columns = ["block", "median\nnorm", "99 %\nnorm", "largest\nnorm", "cls\nnorm"]
    registers = any(block.register_norm for block in side.blocks)
    threshold = any(block.marked["above_threshold"] for block in side.blocks)
    columns += ["register\nnorm"] if registers else []
    columns += ["marked\n(eq. 5)", f"> {factor} ×\nmedian"] + (["above\nlimit"] if threshold else [])
    columns += ["σ₁/σ₂", "angle", "spread"]
    for name in columns:
        table.add_column(name, justify="right")
    for block in side.blocks:
        norm = block.patch_norm
        cells = [str(block.block), *(_short(value) for value in ((norm.median, norm.p99, norm.max) if norm else ()))]
        cells += [] if norm else ["", "", ""]
        cells.append(_median(block.cls_norm))
        cells += [_median(block.register_norm)] if registers else []
        cells += [_tokens(block.marked["equation_5"]), _tokens(block.marked["outlying"])]
        cells += [_tokens(block.marked["above_threshold"])] if threshold else []
        seen = block.observed
        angle, spread = (seen.angle_to_predicted_deg["cumulative"], seen.spread_across_deg) if seen else (None, None)
        table.add_row(*cells, f"{block.gap['cumulative']:.2f}", degrees(angle, ""), degrees(spread, ""))
    return table


def _comparison_table(analysis: Analysis, other: Side, factor: str) -> Table:
    """Return one row per block: largest norm and marked tokens of both sides, and how far their tokens agree."""
    table = plain_table("")
    one_name, two_name = (cut(name, SIDE_LETTERS) for name in short_names(analysis))
    pairs = (("largest", "norm"), (f"> {factor} ×", "median"), ("marked", "(eq. 5)"))
    heads = [f"{word}\n{name}" for pair in pairs for word, name in zip(pair, (one_name, two_name), strict=True)]
    for name in ("block", *heads, "cosine\npatch", "\ncls"):
        table.add_column(name, justify="right")
    for one, two, pair in zip(analysis.blocks, other.blocks, analysis.comparison or (), strict=True):
        cells = [str(one.block)]
        cells += [_short(side.patch_norm.max if side.patch_norm else None) for side in (one, two)]
        cells += [_tokens(side.marked["outlying"]) for side in (one, two)]
        cells += [_tokens(side.marked["equation_5"]) for side in (one, two)]
        cells += [_cosine(pair.patch_cosine), _cosine(pair.cls_cosine)]
        table.add_row(*cells)
    return table


def cut(name: str, letters: int) -> str:
    """Return a name, or its beginning and end where it is longer than so many letters."""
    half = (letters - 1) // 2
    return name if len(name) <= letters else f"{name[: letters - 1 - half]}…{name[-half:]}"


def _sparkline_words(side: Side) -> str:
    largest = [block.patch_norm.max for block in side.blocks if block.patch_norm]
    if not largest:
        return "no token is finite"
    missing = len(side.blocks) - len(largest)
    words = f"largest norm over blocks, log: {sparkline(largest)}  {_short(min(largest))} to {_short(max(largest))}"
    return words + (f", and {missing} blocks without a finite token" if missing else "")


def sparkline(values: Sequence[float]) -> str:
    """Return positive values as bars of eight heights on a log scale, one character each; the lowest if equal."""
    logs = [math.log(max(value, 1e-12)) for value in values]
    low, span = min(logs), max(logs) - min(logs)
    steps = (round((at - low) / span * (len(BARS) - 1)) if span > FLAT else 0 for at in logs)
    return "".join(BARS[step] for step in steps)


def _median(distribution: Distribution | None) -> str:
    return _short(distribution.median) if distribution else ""


def _cosine(distribution: Distribution | None) -> str:
    return f"{distribution.median:.4f}" if distribution else ""


def _tokens(marked: Marked | None) -> str:
    return "–" if marked is None else str(marked.tokens)


def repair_table(result: facts.Recorded) -> RenderableType:
    """Return the verdict, before and after, the blocks with outlying tokens, and where the run directory is."""
    verdict = facts.verdict(result)
    table = plain_table("")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for row in facts.comparison(result):
        table.add_row(row.name, row.before, row.after)
    rows = [row for row in facts.block_rows(result) if row.stands_out]
    defects = result.summary["defects"]
    return Group(
        Text(f"{verdict.word}: {verdict.sentence}", VERDICTS[verdict.kind]),
        *([verdict.advice] if verdict.advice else []),
        table,
        Text("Good tokens: marked at no block of the original; marked tokens: at one or more.", "dim"),
        Text("Good tokens that lean towards the defect are compared without their part along it.", "dim"),
        Text("Similarity to the original is not a goal: outliers spoil its cls.", "dim"),
        *([_repaired_blocks(rows)] if rows else []),
        f"run directory: {printable(str(result.folder))}",
        f"outlying tokens {defects['before']['tokens']:,} → {defects['after']['tokens']:,},"
        f" report: {printable(str(result.folder / 'report.html'))}",
    )


def _repaired_blocks(rows: Sequence[facts.BlockComparison]) -> RenderableType:
    """Return one row per block: outlying tokens, largest norm ÷ median, and what the weights predict of them."""
    table = plain_table("")
    table.padding = (0, 1, 0, 0)
    for name in ("block", "outlying\nbefore", "\nafter", "÷ median\nbefore", "\nafter", "seen\n"):
        table.add_column(name, justify="right")
    for name in ("along\nν", "angle\nto ν", "σ₁/σ₂\n", "pre-\ndicted", "trained\nby"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row.before:,}", f"{row.after:,}", row.ratio_before, row.ratio_after, f"{row.seen:,}"]
        table.add_row(str(row.block), *cells, row.along, row.angle, row.gap, row.predicted, row.rule)
    words = "seen: in all images of the scan; along ν: those marked by the predicted direction ν."
    return Group("", table, Text(words, "dim"))


CAPTION = (
    "≈: within noise of the original: its 95 % interval over resampled images contains 0, or it is less than"
    " repetitions of the protocol differ by. ?: too few images to judge. ↓: lower is better; ·: neither end is."
)
STANDINGS = {"better": "green", "worse": "red", "within noise": "dim", "too few images": "dim"}  # as a style


ARROWS = {"higher": "", "lower": " ↓", "neither": " ·"}  # by which end of a figure is better


def evaluation_table(evaluation: Evaluation, folder: Path | None = None) -> RenderableType:
    """Return a table per task, a row per figure and a column per side, and what the figures say in words."""
    parts: list[RenderableType] = []
    for task in evaluation.tasks:
        table = plain_table(f"{task.task}: {counted(task.images, 'image')}")
        table.add_column("")
        sides = [side for side in evaluation.sides if any(figure.of(side.side) for figure in task.figures)]
        for side in sides:
            table.add_column(side.label, justify="right")
        for figure in task.figures:
            unit, arrow = f", {figure.unit}" if figure.unit else "", ARROWS[figure.better]
            table.add_row(f"{figure.name}{unit}{arrow}", *(_evaluated(figure.of(side.side)) for side in sides))
        labels = {side.side: side.label for side in evaluation.sides}
        notes = [f"{labels[side]}: {note}" for side, texts in task.notes.items() for note in texts]
        parts += [table, Text(task.protocol, "dim"), *notes, *task.sentences, ""]
    parts += [
        headline(evaluation),
        CAPTION,
    ]
    if folder is not None:
        parts.append(f"Written to {folder}")
    return Group(*parts)


def _evaluated(value: ValueRecord | None) -> Text:
    if value is None or value.value is None:
        return Text("–", "dim")
    shown = f"{value.value:.2f}" if abs(value.value) >= 10 else f"{value.value:.4f}"
    if value.to_original is None:
        return Text(shown)
    standing = value.to_original.standing
    mark = {"within noise": " ≈", "too few images": " ?"}.get(standing, "")
    return Text(f"{shown}{mark}", STANDINGS.get(standing, ""))


def export_table(result: ExportResult) -> RenderableType:
    """Return the path and size of what was written, how it was checked, and the line of Python that loads it."""
    return Group(
        f"{printable(str(result.path))}: {counted(len(result.files), 'file')}, {result.bytes:,} bytes",
        ("verified" if result.check.verified else "not verified") + f": {result.check.line}",
        Text(f"in Python: {printable(result.load)}", no_wrap=True, overflow="ignore"),  # whole, to be pasted
    )


def dry_run_table(dry_run: DryRun) -> RenderableType:
    """Return what a repair would train, and what it would cost."""
    table = plain_table("")
    for name in ("", "", ""):
        table.add_column(name)
    for fact in dry_run_facts(dry_run):
        table.add_row(fact.name, fact.value, Text(fact.meaning, "dim"))
    return Group(table, "Nothing was written.")


def conformance_table(result: Conformance) -> RenderableType:
    """Return one line per check, with what was measured or what is wrong."""
    table = plain_table("")
    for name in ("check", "outcome"):
        table.add_column(name)
    table.add_column("", overflow="fold")
    for check in result.checks:
        table.add_row(check.name, Text(check.outcome, OUTCOMES[check.outcome]), check.detail)
    counts = Counter(check.outcome for check in result.checks)
    others = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if outcome != "passed")
    verdict = "does not conform" if result.failed else "conforms"
    words = f"{result.model} {verdict}: {counted(counts['passed'], 'check')} passed" + (f", {others}" if others else "")
    return Group(f"{result.model} ({result.weights})", table, f"{words}.")


def _short(value: float | None) -> str:
    """Return three significant digits in at most six characters; an empty text for None."""
    if value is None:
        return ""
    if 100 <= abs(value) < 1e4:
        return f"{value:.0f}"
    return f"{value:.3g}" if 1e-2 <= abs(value) < 100 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def dry_run_facts(dry_run: DryRun) -> list[Named]:
    """Return what would be trained, on which images, and the cost of a step."""
    batch = "the first batch, as it is"
    return [
        Named("Model", dry_run.model),
        Named("Recipe", dry_run.recipe),
        Named(
            "Images",
            f"{dry_run.training_images:,} to train on, those with a defect; {dry_run.evaluation_images:,} on the guard",
        ),
        Named("Blocks", _runs(dry_run.blocks), "that a step may change"),
        Named("Weights", f"{dry_run.weights:,}", "value, output and MLP weights of these blocks"),
        Named("Singular values", f"{dry_run.values:,}", "all that is trained"),
        Named("Device", dry_run.device),
        Named("A step", duration(dry_run.first.seconds), f"{batch}: {_found(dry_run.first)}"),
        Named("The longest step", duration(dry_run.longest.seconds), "its images marked in the last of these blocks"),
        _all_steps(dry_run),
        Named("Memory", _gib(dry_run.step_bytes), "at the peak of these steps"),
        Named("Memory, later", _gib(dry_run.all_bytes), "once all these blocks have been decomposed"),
    ]


def _found(step: DryStep) -> str:
    return f"{counted(step.defective, 'image')} defective, first at block {step.block}" if step.defective else "clean"


USUAL_STEPS = (10, 50)  # repairs of planted defects in a real model took 7 to 55: tests/real/EVIDENCE.md


def _all_steps(dry_run: DryRun) -> Named:
    """Return what a repair usually takes; for recipes whose number of steps is not known, the most that it can."""
    limit = f"--max-steps {dry_run.max_steps:,} ends it"
    if dry_run.recipe != "sinder" or dry_run.max_steps <= USUAL_STEPS[1]:
        most = duration(dry_run.longest.seconds * dry_run.max_steps)
        return Named("All steps", f"at most {most}", f"{limit}; sooner if the images become clean")
    short, long = (duration(dry_run.longest.seconds * steps) for steps in USUAL_STEPS)
    words = f"{USUAL_STEPS[0]} to {USUAL_STEPS[1]} steps are usual; with looks at the guard and decompositions; {limit}"
    return Named("All steps", f"{short} to {long}, as a rule", words)


def _runs(blocks: tuple[int, ...]) -> str:
    """Return block numbers as ranges: 2–11, 14."""
    starts = [block for block in blocks if block - 1 not in blocks]
    stops = [block for block in blocks if block + 1 not in blocks]
    runs = [str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, stops, strict=True)]
    return ", ".join(runs) or "none: no direction is determined"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
