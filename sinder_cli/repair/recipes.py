"""Recipes: named sets of values for the settings of a repair. What a recipe does not name keeps its default."""

from __future__ import annotations

from typing import Literal

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
        "stop_density": 0.75,
        "stop_images": 1000,
        "eval_every": 100,
    },
}
