"""Limits that several stages share, each with its source; free of torch, so that help texts can quote them."""

MIN_GAP = 1.1  # σ₁/σ₂ under which a direction counts as not determined (ours; see DetectionRule)
