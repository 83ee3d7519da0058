"""The settings of a repair, and recipes, named sets of them: the one source of defaults, help texts and TOML keys."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sinder_cli.defects.settings import MOST, DetectionSettings

Recipe = Literal["sinder", "polyak", "paper"]

RECIPES: dict[Recipe, dict[str, object]] = {
    "sinder": {},  # the defaults
    # Polyak's step length under a trust region, over all singular values of the window at once
    "polyak": {"step": "polyak", "trust": 0.05},
    # SINDER, sections 4 and 5, and the authors' code
    "paper": {
        "step": "sgd",
        "visit": "all",
        "target": "weighted",
        "mark": "weights",
        "norm_factor": 0.0,
        "min_gap": 0.0,
        "min_tokens": 3,
        "max_steps": 30_000,
        "stop_clean_fraction": 0.75,
        "stop_images": 1000,
        "eval_every": 100,
    },
}


# 2000 × the paper's. On demo_vit, four steps of sgd at 1 and at 5 remove outlying tokens; two at 100 reduce the
# cosine to the inpainted original to 0.11 for cls, and to 0.04 for good tokens.
MOST_LR = 10.0

LogName = Literal["tensorboard", "wandb"]

# settings without effect on the result: a resumed run may change them; only the resolved kind of device is compared
WITHOUT_EFFECT = frozenset({"workers", "checkpoint_every", "strict", "offload", "device", "log", "figure_formats"})


OLD_NAMES = {"stop_density": "stop_clean_fraction"}  # of settings; still accepted


def present_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings under the names that they have now."""
    return {OLD_NAMES.get(name, name): value for name, value in settings.items()}


class RepairSettings(DetectionSettings):
    """Settings of a repair; the defaults are those of the recipe `sinder`, and another recipe has other defaults."""

    recipe: Recipe = Field(
        "sinder",
        description="Set of defaults for many options: sinder, polyak, or paper. Options that are given"
        " take precedence.",
    )
    min_tokens: int = Field(1, ge=1, le=MOST, description="Defective tokens that make a block defective.")
    step: Literal["greedy", "polyak", "sgd"] = Field(
        "greedy",
        description="greedy: shrink the singular value that moves defective tokens most, compared with good ones; "
        "polyak: change all of the window, with Polyak's step length; sgd: change all, with lr and momentum.",
    )
    trust: float = Field(0.5, gt=0, le=1, description="Largest relative change of the singular values in a step.")
    max_drift: float = Field(
        0.05, gt=0, description="Largest movement of good tokens in a greedy step, relative to their mean norm."
    )
    min_gain: float = Field(
        3.0,
        ge=0,
        description="Smallest ratio of the movement of defective tokens to that of good ones for a greedy step.",
    )
    lr: float = Field(
        0.005, gt=0, le=MOST_LR, description="Learning rate of sgd for the deltas of the singular values; at most 10."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of sgd.")
    target: Literal["unmarked", "weighted"] = Field(
        "unmarked",
        description="Where to move defective tokens: to the average of unmarked neighbours, or the paper's average.",
    )
    temperature: float = Field(0.1, gt=0, description="τ of the weights of the paper's average.")
    window: int = Field(
        10, ge=1, le=MOST, description="Blocks, ending at the first defective one, that a step may change."
    )
    visit: Literal["defective", "all"] = Field(
        "defective", description="Images to train on: those with a defect before the repair, or all."
    )
    scan_images: int = Field(
        1000,
        ge=1,
        le=MOST,
        description="Largest number of images examined before the first step, chosen at random (--seed).",
    )
    max_steps: int = Field(
        1000,
        ge=1,
        le=MOST,
        description="Largest number of steps of the whole run; the images are used repeatedly. With --resume and a"
        " larger number, a run that has ended there goes on.",
    )
    stop_clean_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Stop when this fraction of the latest images has no defect that a step can reduce.",
    )
    stop_images: int = Field(
        64, ge=1, le=MOST, description="Number of latest images for stop_clean_fraction; at most one pass (paper: two)."
    )
    eval_images: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="Number of images in the guard, which judges every state and is never trained on; default: a"
        " tenth, at least 4, at most 64; never more than half of your images.",
    )
    eval_every: int = Field(
        5, ge=0, le=MOST, description="Steps between two evaluations on the guard's images; 0: only at the end."
    )
    min_fidelity: float = Field(
        0.95,
        ge=0,
        le=1,
        description="Cosine to the inpainted original that cls and good tokens of the guard must reach, unless they are"
        " a quarter nearer to it than the original; they must never be further from it than the original.",
    )
    keep: Literal["best", "last"] = Field(
        "best",
        description="best: the best state by the guard, or the original; last: the state after the last step.",
    )
    checkpoint_every: str = Field("10min", description="Steps, or minutes, between two checkpoints: 200 or 10min.")
    offload: bool = Field(False, description="Keep U and V on the CPU between steps: less memory on the device.")
    strict: bool = Field(
        False,
        description="Stop at the first unreadable image; default: stop above 1 %, but accept one that was unreadable"
        " from the start.",
    )
    log: tuple[LogName, ...] = Field((), description="Log the steps to a tracker as well; repeatable.")

    @model_validator(mode="before")
    @classmethod
    def _of_the_recipe(cls, given: Any) -> Any:
        """Fill in the values of the named recipe for settings that are not given."""
        if not isinstance(given, dict):
            return given
        given = present_names(given)
        below = next((values for name, values in RECIPES.items() if name == given.get("recipe")), {})
        return {**below, **given}

    @model_validator(mode="after")
    def _consistent(self) -> RepairSettings:
        if self.norm_factor == 0 and self.mark == "norm":
            raise ValueError("mark norm needs a norm_factor above 0")
        return self

    @field_validator("checkpoint_every", mode="before")
    @classmethod
    def _steps_or_minutes(cls, value: object) -> str:
        if not re.fullmatch(r"[1-9][0-9]{0,8}( ?min)?", str(value)):
            raise ValueError("give steps, as 200, or minutes, as 10min")
        return str(value)

    @property
    def checkpoint_unit(self) -> tuple[int, Literal["steps", "minutes"]]:
        """Number of steps or minutes after which a checkpoint is due."""
        number = int(re.sub(r"\D", "", self.checkpoint_every))
        return number, "minutes" if self.checkpoint_every.endswith("min") else "steps"
