"""The settings of a repair: the one source of defaults, help texts, TOML keys and `config.json`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from sinder_cli.defects.settings import DetectionSettings

LogName = Literal["tensorboard", "wandb"]

# on the result: a resumed run may change them; of the device, the kind that it was resolved to is compared
WITHOUT_EFFECT = frozenset({"workers", "checkpoint_every", "strict", "offload", "device", "log"})


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
    eval_every: int = Field(
        0, ge=0, description="Steps between two looks at the evaluation images, then held out of training; 0: none."
    )
    checkpoint_every: str = Field("10min", description="Steps, or minutes, between two checkpoints: 200, 10min.")
    offload: bool = Field(False, description="Keep U and V on the CPU between steps: less memory on the device.")
    strict: bool = Field(
        False,
        description="Stop at the first image that cannot be read; else above 1 %, or two broken from the start.",
    )
    log: tuple[LogName, ...] = Field((), description="Log the steps to a tracker as well; repeatable.")

    @field_validator("checkpoint_every", mode="before")
    @classmethod
    def _steps_or_minutes(cls, value: object) -> str:
        if not re.fullmatch(r"[1-9]\d*( ?min)?", str(value)):
            raise ValueError("give steps, as 200, or minutes, as 10min")
        return str(value)

    @property
    def checkpoint_unit(self) -> tuple[int, Literal["steps", "minutes"]]:
        """After how much a checkpoint is due."""
        number = int(re.sub(r"\D", "", self.checkpoint_every))
        return number, "minutes" if self.checkpoint_every.endswith("min") else "steps"
