"""The words and numbers that page, model card and table of a repair share: a verdict, and rows of tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sinder_cli.repair.settings import RepairSettings
from sinder_cli.report.wording import Named, counted, duration, number, percent, setting_rows

if TYPE_CHECKING:
    from sinder_cli.repair.results import RepairResult


class RepairVerdict(NamedTuple):
    """How a repair went: `kind` is `good`, `none` or `open`, for colour; `word` opens the sentence."""

    kind: str
    word: str
    sentence: str


class Recorded(Protocol):
    """A repair that has ended, as `summary.json` and `config.json` tell it."""

    @property
    def summary(self) -> dict[str, Any]: ...

    @property
    def config(self) -> dict[str, Any]: ...


class Compared(NamedTuple):
    """One measure of the original and of the repaired model."""

    name: str
    before: str
    after: str


def verdict(result: RepairResult) -> RepairVerdict:
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
        return RepairVerdict("none", "Nothing to repair", f"no step changed a weight; {found}.")
    if after == 0 < before:
        return RepairVerdict("good", "Repaired", f"{change}.")
    if after == 0:
        return RepairVerdict("none", "Repaired", f"no token stood out before or after, among {of_all}.")
    left = f"{counted(after, 'token')} left ({change})"
    if after >= before:
        return RepairVerdict("open", "Not repaired", f"{left}.")
    if summary["stopped_by"] == "density":
        return RepairVerdict("good", "Repaired for the most part", f"{left}.")
    return RepairVerdict("open", "Not finished", f"{left}.")


def comparison(result: Recorded) -> list[Compared]:
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


def run_facts(result: Recorded) -> list[Named]:
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


def stop_reason(result: Recorded) -> str:
    """Why the loop ended, in words."""
    share = f"{percent(result.summary['clean_share'])} of recent images clean"
    goal = percent(result.config["settings"]["stop_density"])
    if result.summary["stopped_by"] == "density":
        return f"{share} (goal: {goal})"
    return f"the step limit, with {share} (goal: {goal})"


def setting_facts(result: Recorded) -> list[Named]:
    """The settings that were in force, each with its help text."""
    return setting_rows(RepairSettings, result.config["settings"])


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
