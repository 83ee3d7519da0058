"""What a repair would do and cost, in words: `sinder repair --dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinder_cli.report.formatting import Named, counted, duration

if TYPE_CHECKING:
    from sinder_cli.repairing.dry_run import Trial, TrialStep


def trial_facts(trial: Trial) -> list[Named]:
    """What would be trained, on what, and the cost of a step."""
    batch = "the first batch, as it is"
    return [
        Named("Model", trial.model),
        Named("Recipe", trial.recipe),
        Named(
            "Images",
            f"{trial.training_images:,} to train on, those with a defect; {trial.evaluation_images:,} on the guard",
        ),
        Named("Blocks", _runs(trial.blocks), "that a step may change"),
        Named("Weights", f"{trial.weights:,}", "value, output and MLP weights of these blocks"),
        Named("Singular values", f"{trial.values:,}", "all that is trained"),
        Named("Device", trial.device),
        Named("A step", duration(trial.first.seconds), f"{batch}: {_found(trial.first)}"),
        Named("The longest step", duration(trial.longest.seconds), "its images marked in the last of these blocks"),
        Named("All steps", f"at most {duration(trial.longest.seconds * trial.max_steps)}", _steps(trial)),
        Named("Memory", _gib(trial.step_bytes), "at the peak of these steps"),
        Named("Memory, later", _gib(trial.all_bytes), "once all these blocks have been decomposed"),
    ]


def _found(step: TrialStep) -> str:
    return f"{counted(step.defective, 'image')} defective, first at block {step.block}" if step.defective else "clean"


def _steps(trial: Trial) -> str:
    return f"{trial.max_steps:,} of them, beside decomposing each block once; fewer when the images are clean"


def _runs(blocks: tuple[int, ...]) -> str:
    """Numbers as runs: 2–11, 14."""
    starts = [block for block in blocks if block - 1 not in blocks]
    stops = [block for block in blocks if block + 1 not in blocks]
    runs = [str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, stops, strict=True)]
    return ", ".join(runs) or "none: no direction is determined"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
