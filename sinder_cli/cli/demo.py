"""`sinder demo`: the whole story on a small model that needs no download."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType

from sinder_cli import api
from sinder_cli.cli.output import program_as_called, show
from sinder_cli.errors import CannotCreateError
from sinder_cli.exporting.targets import ExportSettings
from sinder_cli.folders import RUNS
from sinder_cli.report.progress import display
from sinder_cli.requests import ExportRequest, PredictRequest, Process, RepairRequest

MODEL = "demo_vit"
HOME = Path(RUNS, "demo")
NEXT = (  # each works as it is, once the demo has run
    "analyze {model} {out}/pictures/image.jpg --compare {out} --format table",
    "evaluate {out} dense",
    "runs {home}",
    "backbones",
    "repair -h",
)


def command(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Run directory; the run of an earlier demo is replaced.")
    ] = HOME,
) -> None:
    """Predict, repair and export a small model with a planted defect: a minute or two, and no download."""
    from sinder_cli.backbone.hooks import ModelRequest
    from sinder_cli.report.tables import export_table, prediction_table, repair_table

    _require_own(out)
    with display() as emit:
        process = Process(emit)
        prediction = api.predict_defects(PredictRequest(ModelRequest(MODEL)), process=process)
        _show(
            "The weights alone predict where tokens will stand out, and in which direction:",
            prediction_table(prediction),
        )
        result = api.repair(RepairRequest(MODEL, force=True), out, process=process)
        assert result is not None  # there is one process
        _show(
            "A repair shrinks the singular values that write them, and judges itself by the features:",
            repair_table(result),
        )
        exported = api.export(
            ExportRequest(out, ExportSettings(to="native", force=True)), out / "exported.pth", process=process
        )
        _show("The repaired weights, with the model's own keys:", export_table(exported))
    counts = [result.summary["defects"][when]["tokens"] for when in ("before", "after")]
    program = shlex.join(program_as_called())
    report = out / "report.html"
    words = [
        f"outlying tokens {counts[0]} → {counts[1]} · report: {report}",
        "",
        "Next, as they stand; then with a model and photographs of yours:",
    ]
    named = {"model": MODEL, "out": shlex.quote(str(out)), "home": shlex.quote(str(out.parent))}
    _show(*words)
    for line in NEXT:  # not as wide as the terminal: a command that is broken in two is none
        print(f"  {program} {line.format_map(named)}")


def _require_own(out: Path) -> None:
    """Refuse to replace a run that is not an earlier demo's. Raises `CannotCreateError`."""
    from sinder_cli.repairing.folder import RunFolder
    from sinder_cli.repairing.settings import WITHOUT_EFFECT, RepairSettings

    run = RunFolder(out)
    if not run.config.is_file():
        return  # the repair itself refuses a folder of other files
    config = run.read_config()
    called, settings = dict(config.get("call") or {}), config.get("settings") or {}
    plain = called.pop("model", None) == MODEL and not any(called.values())  # no weights, no images
    usual = RepairSettings.model_validate({}).model_dump(mode="json", exclude={*WITHOUT_EFFECT, "image_size"})
    same = all(settings.get(name) == value for name, value in usual.items())
    if plain and same and not (config.get("images") or {}).get("given"):
        return
    raise CannotCreateError(f"cannot replace {out}", "it holds a run that is no demo's", "name another --out")


def _show(*parts: RenderableType) -> None:
    show("table", lambda: Group("", *parts), list)
