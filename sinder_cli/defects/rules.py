"""Limits that several stages share, each with its source; free of torch, so that help texts can quote them."""

from __future__ import annotations

from typing import Literal

MIN_GAP = 1.1  # σ₁/σ₂ under which a direction counts as not determined (ours; see DetectionRule)

NORM_FACTOR = 3.0  # × the median patch norm of the image: the rule of thumb for "high-norm"

Mark = Literal["auto", "weights", "norm"]
Stage = Literal["attention", "mlp", "block", "cumulative"]
STAGES: tuple[Stage, ...] = ("attention", "mlp", "block", "cumulative")
SLACK = 0.005  # of a cosine: what a state may lie further from the inpainted original than the original itself
