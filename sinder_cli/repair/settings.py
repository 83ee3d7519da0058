"""The settings of a repair: the one source of defaults, help texts, TOML keys and `config.json`."""

from __future__ import annotations

from pydantic import Field

from sinder_cli.defects.settings import DetectionSettings


class RepairSettings(DetectionSettings):
    """Defaults are the paper's (SINDER, section 5, and the authors' code) where it has the setting."""

    max_steps: int = Field(30_000, ge=1, description="Steps at most; images are gone through again in a new order.")
    lr: float = Field(0.005, gt=0, description="Learning rate of the singular values' deltas.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of the SGD.")
    window: int = Field(10, ge=1, description="Blocks, ending at the first defective one, that a step may change.")
    temperature: float = Field(0.1, gt=0, description="τ of the weights of a learning target.")
    stop_density: float = Field(
        0.75, gt=0, le=1, description="Stop when this share of the last 1000 images (or two passes) had no defect."
    )
    eval_images: int = Field(32, ge=1, description="Images on which before and after are compared.")
