"""The words and numbers that the page and the model card share: a verdict, and rows of tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sinder_cli.repair.settings import RepairSettings

if TYPE_CHECKING:
    from pydantic import BaseModel

    from sinder_cli.repair.results import RepairResult

PAPER_TITLE = "SINDER: Repairing the Singular Defects of DINOv2"
PAPER_AUTHORS = "Haoqi Wang, Tong Zhang, Mathieu Salzmann"
PAPER_VENUE = "ECCV 2024"
PAPER_ARXIV = "2407.16826"
PAPER_URL = f"https://arxiv.org/abs/{PAPER_ARXIV}"


class Verdict(NamedTuple):
    """How a repair went: `kind` is `good`, `none` or `open`, for colour; `word` opens the sentence."""

    kind: str
    word: str
    sentence: str


class Compared(NamedTuple):
    """One measure of the original and of the repaired model."""

    name: str
    before: str
    after: str


class Named(NamedTuple):
    """One fact, with what it means where its name does not say it."""

    name: str
    value: str
    meaning: str = ""


def number(value: float) -> str:
    """Four significant digits, with commas: 0.01234, 21.08, 432.5, 12,346."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def percent(fraction: float) -> str:
    """0.0048 → 0.48 %, held together by a no-break space."""
    return f"{100 * fraction:.3g}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """66.2 → 1 min 06 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def counted(count: int, noun: str) -> str:
    """1 step, 1,200 steps."""
    ending = "" if count == 1 else "es" if noun.endswith(("ch", "s", "x")) else "s"
    return f"{count:,} {noun}{ending}"


def verdict(result: RepairResult) -> Verdict:
    """What came of a repair, judged by the outlying tokens of the evaluation images."""
    summary = result.summary
    before, after = (int(summary["defects"][side]["tokens"]) for side in ("before", "after"))
    of_all = f"{result.before.norms.numel():,} on {counted(summary['evaluation_images'], 'image')}"
    change = f"tokens above 3 × the median norm {before:,} → {after:,} of {of_all}"
    if not summary["changed_weights"]:
        found = (
            f"{before:,} of {of_all} have a norm above 3 × the median"
            if before
            else f"no token stands out among {of_all}"
        )
        return Verdict("none", "Nothing to repair", f"no step changed a weight; {found}.")
    if after == 0 < before:
        return Verdict("good", "Repaired", f"{change}.")
    if after == 0:
        return Verdict("none", "Repaired", f"no token stood out before or after, among {of_all}.")
    left = f"{counted(after, 'token')} left ({change})"
    if after >= before:
        return Verdict("open", "Not repaired", f"{left}.")
    if summary["stopped_by"] == "density":
        return Verdict("good", "Repaired for the most part", f"{left}.")
    return Verdict("open", "Not finished", f"{left}.")


def comparison(result: RepairResult) -> list[Compared]:
    """Before and after, measure by measure, over all evaluation images."""
    before, after = (result.summary["defects"][side] for side in ("before", "after"))
    cosine = result.summary["cls_cosine"]
    rows = [
        Compared("Outlying tokens", f"{before['tokens']:,}", f"{after['tokens']:,}"),
        Compared("Share of all patch tokens", percent(before["fraction"]), percent(after["fraction"])),
        Compared("Largest norm", number(before["max_norm"]), number(after["max_norm"])),
        Compared("Median norm", number(before["median_norm"]), number(after["median_norm"])),
        Compared("Largest ÷ median, worst image", number(before["max_ratio"]), number(after["max_ratio"])),
    ]
    if cosine is None:
        return [*rows, Compared("cls cosine to the original", "no cls token", "no cls token")]
    return [*rows, Compared("cls cosine to the original, mean", "1", f"{cosine:.4f}")]


def run_facts(result: RepairResult) -> list[Named]:
    """How long the repair took, why it stopped and what it changed."""
    summary = result.summary
    skipped = [
        f" ({counted(summary[key], noun)} skipped)" if summary[key] else ""
        for key, noun in (("skipped_steps", "step"), ("skipped_images", "image"))
    ]
    return [
        Named("Steps", f"{summary['steps']:,}{skipped[0]}"),
        Named("Images seen", f"{summary['images']:,}{skipped[1]}"),
        Named("Stopped by", stop_reason(result)),
        Named("Time", duration(summary["seconds"])),
        Named("Weights changed", f"{summary['changed_weights']:,}"),
        Named("Singular values trained", f"{summary['trained_values']:,}"),
    ]


def stop_reason(result: RepairResult) -> str:
    """Why the loop ended, in words."""
    share = f"{percent(result.summary['clean_share'])} of recent images clean"
    goal = percent(result.config["settings"]["stop_density"])
    if result.summary["stopped_by"] == "density":
        return f"{share} (goal: {goal})"
    return f"the step limit, with {share} (goal: {goal})"


def setting_facts(result: RepairResult) -> list[Named]:
    """The settings that were in force, each with its help text."""
    return settings_told(RepairSettings, result.config["settings"])


def settings_told(kind: type[BaseModel], values: Mapping[str, Any]) -> list[Named]:
    """Settings of one kind, each with its help text."""
    fields = kind.model_fields
    return [
        Named(name, _told(value), (fields[name].description or "") if name in fields else "")
        for name, value in values.items()
    ]


def _told(value: object) -> str:
    if value is None:
        return "default"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def origin_facts(result: RepairResult) -> list[Named]:
    """The model, the images and the program that this result comes from."""
    config = result.config
    return [
        Named("Model", result.model),
        Named("Weights", str(config["weights"]["source"])),
        Named("Fingerprint of the weights", str(config["weights"]["fingerprint"])),
        Named("Images", f"{config['images']['count']:,}"),
        Named("Fingerprint of the images", str(config["images"]["fingerprint"])),
        Named("Device", str(config["device"])),
        *(Named(f"{name} version", str(version)) for name, version in config["versions"].items()),
    ]
