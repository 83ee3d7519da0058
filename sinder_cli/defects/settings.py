"""Settings of everything that runs images, and limits that several stages share; without an import of torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sinder_cli.backbone.device import DEVICE_NAMES, is_device_name
from sinder_cli.errors import NoInputError, UsageError, excerpt
from sinder_cli.faults import first_fault, quoted

MOST_GAP = 1e12  # σ₁/σ₂ is given as no larger: JSON knows no infinity
CERTAIN = 2.0  # × the norm factor: above it, the norm in one block is enough evidence
RISE = 1.5  # × its own ratio at the embedding: a patch of high contrast has a large norm from the start, and no defect
MIN_GAP = 1.1  # σ₁/σ₂ below which a direction counts as not determined (ours; see DetectionRule)

PREDICTED_DEGREES = 30.0  # an observed direction within this angle of a determined predicted one counts as that one

NORM_FACTOR = 3.0  # × the median patch norm of the image: the rule of thumb for "high-norm"

Mark = Literal["auto", "weights", "norm"]
Stage = Literal["attention", "mlp", "block", "cumulative"]
STAGES: tuple[Stage, ...] = get_args(Stage)
SLACK = 0.005  # of a cosine: how much further a state may be from the inpainted original than the original is


MOST = 10**9  # upper limit of every count, which PyTorch and the operating system accept


FigureFormats = Annotated[
    tuple[Literal["svg", "pdf", "csv"], ...],
    Field(description="Write charts in this format too, besides PNG: svg, pdf, or csv with their numbers; repeatable."),
]


class PassSettings(BaseModel):
    """Settings of passes over images: what is run, where, and in which precision."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    image_size: int | None = Field(
        None, ge=1, le=MOST, description="Side of the images in pixels; default: the model's."
    )
    batch_size: int = Field(1, ge=1, le=MOST, description="Images per batch; in a repair, of all processes together.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision of the forward passes; deltas and weights stay float32."
    )
    tf32: bool = Field(False, description="Allow TF32 in the float32 products of a pass, on CUDA devices that have it.")
    device: str = Field("auto", description=f"Device to run on: {DEVICE_NAMES}.")
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="Random seed for the order and choice of images, and for drawn images."
    )
    workers: int | None = Field(
        None,
        ge=0,
        le=64,
        description="Processes that decode images; 0: none; default: one per spare core, at most 4.",
    )

    @field_validator("device")
    @classmethod
    def _of_a_kind(cls, value: str) -> str:
        if not is_device_name(value):
            raise ValueError(f"it must be {DEVICE_NAMES}, not {quoted(value)}")
        return value


class DetectionSettings(PassSettings):
    """Settings of passes over images, and when a token counts as defective (SINDER, sections 4, 5; the norms: ours)."""

    mark: Mark = Field(
        "auto",
        description="norm: every token of outlying norm; weights: those of them that the weights predict; auto: those"
        " that the weights predict, whose norm is very high, or which are outlying in the next block too.",
    )
    norm_factor: float = Field(
        NORM_FACTOR,
        ge=0,
        description="Multiple of the median norm above which a token is outlying; 0: the paper's rule, by angle alone.",
    )
    mask_threshold: float = Field(
        4.0,
        gt=0,
        description="Standard deviations beyond which equation (5) marks a token as predicted by the weights.",
    )
    min_tokens: int = Field(3, ge=1, le=MOST, description="Defective tokens that make a block defective.")
    min_gap: float = Field(
        MIN_GAP, ge=0, description="σ₁/σ₂ that a direction needs to be trusted; 0: the paper's rule."
    )
    kernel: Literal[3, 5] = Field(
        3,
        description="Side of the neighbourhood, in patches; equation (5) marks no token nearer to the"
        " border than half of it.",
    )
    figure_formats: FigureFormats = ()


Settings = TypeVar("Settings", bound=PassSettings)


def read_settings(kind: type[Settings], given: dict[str, object], file: Path | None = None) -> Settings:
    """Read settings from a TOML file; those given on the command line take precedence.

    Raises `NoInputError` for a missing file, and a `UsageError` that names the setting and what is wrong with it.
    """
    stored = _read_toml(file) if file else {}
    try:
        return kind.model_validate(stored | given)
    except ValidationError as error:
        place, why = first_fault(error, kind.model_fields)
        what = f"bad setting {place[0]!r}" if place else "settings contradict each other"
        where = f" in {file}" if file and not {*place[:1]} & given.keys() else ""
        raise UsageError(f"{what}{where}", why, "--help-all lists the settings") from error


def _read_toml(file: Path) -> dict[str, object]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise NoInputError(f"cannot read settings {file}", error.strerror or str(error), "check --config") from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, numbers with too many digits, nested too deeply
        raise UsageError(f"cannot read settings {file}", excerpt(str(error)), "it must be TOML") from error
