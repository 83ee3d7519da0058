"""An evaluation as files: the document, a CSV of all values, and the page with the images that changed most."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.files import make_folder, output_error, write_json, write_text
from sinder_cli.report.documents import evaluation_document

if TYPE_CHECKING:
    from sinder_cli.evaluation.records import Evaluation
    from sinder_cli.evaluation.run import EvaluationResult
    from sinder_cli.evaluation.settings import EvaluateSettings
    from sinder_cli.events import Emit


def write_evaluation(folder: Path, result: EvaluationResult, settings: EvaluateSettings, emit: Emit) -> None:
    """Write everything into `folder`; the document comes last, so that it stands for a whole evaluation.

    Raises `CannotCreateError` or `StorageError` for what the file system refuses.
    """
    try:
        make_folder(folder)
    except OSError as error:
        raise output_error(folder, error) from error
    write_text(folder / "evaluation.csv", csv_text(result.evaluation))
    write_json(folder / "evaluation.json", evaluation_document(result.evaluation))


def csv_text(evaluation: Evaluation) -> str:
    """Return all values as CSV, a row per task, figure and side."""
    rows = list(evaluation.rows())
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["task"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
