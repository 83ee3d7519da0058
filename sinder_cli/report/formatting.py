"""Numbers, counts and settings in the words that every report uses, and the paper that the method is from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pydantic import BaseModel


PAPER_TITLE = "SINDER: Repairing the Singular Defects of DINOv2"
PAPER_AUTHORS = "Haoqi Wang, Tong Zhang, Mathieu Salzmann"
PAPER_VENUE = "ECCV 2024"
PAPER_ARXIV = "2407.16826"
PAPER_URL = f"https://arxiv.org/abs/{PAPER_ARXIV}"
CITATION = f"""@inproceedings{{wang2024sinder,
  title     = {{{PAPER_TITLE}}},
  author    = {{Wang, Haoqi and Zhang, Tong and Salzmann, Mathieu}},
  booktitle = {{European Conference on Computer Vision (ECCV)}},
  year      = {{2024}},
  note      = {{arXiv:{PAPER_ARXIV}}}
}}"""

NOTHING = "–"  # in a cell without a value

# Jiang et al., "Vision Transformers Don't Need Trained Registers", 2025, arXiv 2506.08010
CAUTION = (
    "Outliers may carry information. Zeroing the ten register neurons that write those of OpenCLIP-B costs it zero-shot"
    " accuracy (70.4 → 55.6 %); moving what they write into an extra token costs none (Jiang et al. 2025, arXiv"
    " 2506.08010). The inpainted original says what the network would say without outliers, not that it would be right."
    " So a cls that moves far is a question for a task, and no success by itself: try the repaired model on what it is"
    " used for, above all one like CLIP, whose cls is compared with texts."
)


class Named(NamedTuple):
    """One fact, with what it means where its name does not say it."""

    name: str
    value: str
    meaning: str = ""


def number(value: float, digits: int = 4) -> str:
    """Four significant digits, with commas: 0.01234, 21.08, 432.5, 12,346; or that it is not finite."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def numbers(values: Sequence[float]) -> list[str]:
    """Each as `number`, with as many digits as it takes to tell them apart."""
    for digits in range(4, 17):
        told = [number(value, digits) for value in values]
        if len(set(told)) == len(set(values)):
            return told
    return [repr(value) for value in values]


def percent(fraction: float) -> str:
    """0.0048 → 0.48 %, held together by a no-break space."""
    return f"{100 * fraction:.3g}\N{NO-BREAK SPACE}%"


def degrees(value: float | None, missing: str = NOTHING) -> str:
    """Degrees, with a decimal under 10: 3.1°, 47°."""
    return missing if value is None else f"{value:.0f}°" if value >= 9.95 else f"{value:.1f}°"


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


def setting_rows(kind: type[BaseModel], values: Mapping[str, Any]) -> list[Named]:
    """Settings of one kind, each with its help text."""
    fields = kind.model_fields
    return [
        Named(name, _setting(value), (fields[name].description or "") if name in fields else "")
        for name, value in values.items()
    ]


def _setting(value: object) -> str:
    if value is None:
        return "default"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
