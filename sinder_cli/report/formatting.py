"""Numbers, counts and settings worded the same way in every report, and the paper that the method comes from."""

from __future__ import annotations

import csv
import io
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
    "Outliers may carry information. In OpenCLIP-B, zeroing the ten register neurons that write the outliers lowers"
    " zero-shot accuracy (70.4 → 55.6 %); moving what they write into an extra token does not (Jiang et al. 2025, arXiv"
    " 2506.08010). The inpainted original shows what the network would give without outliers, not that this is right."
    " A cls that moves far is therefore no success by itself: test the repaired model on the task that it is used for,"
    " above all a model like CLIP, whose cls is compared with texts."
)


class Named(NamedTuple):
    """One fact: its name, its value, and its meaning if the name does not make it clear."""

    name: str
    value: str
    meaning: str = ""


def number(value: float, digits: int = 4) -> str:
    """Return `value` with `digits` significant digits: 0.01234, 21.08, 432.5, 12,346; or `not finite`."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def numbers(values: Sequence[float]) -> list[str]:
    """Return each value as `number` writes it, with as many digits as are needed to tell them apart."""
    for digits in range(4, 17):
        texts = [number(value, digits) for value in values]
        if len(set(texts)) == len(set(values)):
            return texts
    return [repr(value) for value in values]


def percent(fraction: float) -> str:
    """Return a fraction as a percentage, 0.0048 → 0.48 %, with a no-break space before the sign."""
    return f"{100 * fraction:.3g}\N{NO-BREAK SPACE}%"


def degrees(value: float | None, missing: str = NOTHING) -> str:
    """Return degrees, with one decimal under 10: 3.1°, 47°; `missing` if there is no value."""
    return missing if value is None else f"{value:.0f}°" if value >= 9.95 else f"{value:.1f}°"


def duration(seconds: float) -> str:
    """Return a duration with its units: 66.2 → 1 min 06 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: 1 step, 1,200 steps."""
    ending = "" if count == 1 else "es" if noun.endswith(("ch", "s", "x")) else "s"
    return f"{count:,} {noun}{ending}"


def setting_rows(kind: type[BaseModel], values: Mapping[str, Any]) -> list[Named]:
    """Return the settings in `values`, each with its help text from `kind`."""
    fields = kind.model_fields
    return [
        Named(name, _setting(value), (fields[name].description or "") if name in fields else "")
        for name, value in values.items()
    ]


def _setting(value: object) -> str:
    if value is None:
        return "default"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows with the same columns as CSV; nothing stands for a value that is not there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
