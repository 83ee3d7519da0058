"""Model cards: the `README.md` of a run directory, and of an exported folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli import __version__
from sinder_cli.exporting import licences
from sinder_cli.exporting.origins import PLACEHOLDER, base_repository, told_model, told_source
from sinder_cli.files import public_model, public_place, public_source
from sinder_cli.repairing.folder import RUN_FILES, FinishedRun
from sinder_cli.repairing.settings import WITHOUT_EFFECT
from sinder_cli.report import formatting
from sinder_cli.report.formatting import Named
from sinder_cli.report.repair import facts
from sinder_cli.report.repair.pictures import read_pictures
from sinder_cli.report.templates import markdown_template

if TYPE_CHECKING:
    from sinder_cli.exporting.targets import ExportCheck, ExportTarget, Plan
    from sinder_cli.repairing.folder import RunFolder
    from sinder_cli.repairing.results import RepairResult


WRITTEN_WITH_THE_CARD = ("pictures/", "report.html", "README.md")


def render_card(result: RepairResult) -> str:
    """Return the card of a run in Markdown; it states only what `result` holds."""
    return markdown_template("repair_card.md.jinja").render(
        model=public_model(result.model),
        folder=shlex.quote(result.folder.resolve().name),
        window=result.config["settings"]["window"],
        verdict=facts.verdict(result),
        changed=bool(result.summary["changed_weights"]),
        title=facts.title(result.summary),
        comparison=facts.comparison(result),
        run=facts.run_facts(result),
        settings=facts.setting_facts(result),
        weights=result.config["weights"] | {"source": public_source(result.config["weights"]["source"])},
        images=result.config["images"],
        places=["standard input" if place == "-" else public_place(place) for place in result.config["call"]["data"]],
        versions=result.config["versions"],
        device=result.config["device"],
        summary=result.summary,
        judged_on=facts.guard_images(result.summary),
        rule=facts.rule_words(result),
        caution=formatting.CAUTION,
        image_words=facts.image_words(result),
        files=files_in(result.folder),
        formatting=formatting,
    )


def files_in(folder: Path) -> list[formatting.Named]:
    """Return the files of a run directory that exist, or that are written together with the card."""
    return [
        formatting.Named(name, meaning)
        for name, meaning in RUN_FILES.items()
        if name in WRITTEN_WITH_THE_CARD or (folder / name).exists()
    ]


def write_export_card(draft: Path, plan: Plan, target: ExportTarget, check: ExportCheck, name: str) -> None:
    """Write `README.md` and the pictures of the run that it shows into a folder that will have the given name."""
    run = _folder_of(plan)
    pictures = (
        {f"pictures/{each.name}": each for each in read_pictures(run.pictures)} if run and not target.public else {}
    )
    card = render_export_card(plan, target, check, name, {file: each.words for file, each in pictures.items()})
    contents = {"README.md": card.encode(), **{file: each.content for file, each in pictures.items()}}
    for file, content in contents.items():
        (draft / file).parent.mkdir(exist_ok=True)
        (draft / file).write_bytes(content)


def render_export_card(
    plan: Plan, target: ExportTarget, check: ExportCheck, folder: str, pictures: Mapping[str, str] | None = None
) -> str:
    """Return the card in Markdown, with the metadata that a hub reads.

    `pictures` maps the names of picture files in the folder to their descriptions.
    """
    backbone, run = plan.backbone, _run_of(plan)
    place = (plan.settings.repo_id or PLACEHOLDER) if target.public else folder
    return markdown_template("export_card.md.jinja").render(
        model=told_model(plan, target.public),
        license=backbone.license,
        metadata=[line for line in _metadata(plan, check) if line],
        target=plan.settings.to,
        summary=target.summary,
        facts=_facts(plan, target.public),
        check=check,
        usage=target.loading(plan, place).text,
        placeholder=place == PLACEHOLDER,
        verdict=facts.verdict(run) if run else None,
        comparison=facts.comparison(run) if run else [],
        rule=facts.rule_words(run) if run else "",
        judged_on=facts.guard_images(run.summary) if run else "",
        image_words=facts.image_words(run) if run else "",
        caution=formatting.CAUTION,
        unchanged=run is not None and not run.summary["changed_weights"],
        run=run,
        run_facts=facts.run_facts(run) if run else [],
        settings=[row for row in facts.setting_facts(run) if row.name not in WITHOUT_EFFECT] if run else [],
        pictures=pictures or {},
        repaired=plan.repaired,
        version=__version__,
        formatting=formatting,
    )


def _metadata(plan: Plan, check: ExportCheck) -> list[str]:
    """Return the lines of the YAML header; strings are written as in JSON, which YAML reads too."""
    base = base_repository(plan)
    return [
        *(licences.metadata(plan.backbone.license) if plan.backbone.license else []),
        f"base_model: {json.dumps(base)}" if base else "",
        'library_name: "transformers"' if plan.settings.to in ("transformers", "hf-repo") else "",
        "pipeline_tag: image-feature-extraction",
        f"verified: {json.dumps(check.verified)}",
    ]


def _facts(plan: Plan, public: bool) -> list[Named]:
    backbone, repaired = plan.backbone, plan.repaired
    source = told_source(plan, public)
    registers = backbone.prefix_tokens - backbone.has_cls
    rows = [
        Named("Model", told_model(plan, public)),
        Named("Licence of the weights", backbone.license or "that of the base model, which is not known here"),
        Named("Read from", source),
        Named("Blocks, width", f"{backbone.depth}, {backbone.width}"),
        Named("Patches", f"{backbone.patch_size} × {backbone.patch_size} pixels"),
        Named(
            "Prefix tokens", f"{'cls' if backbone.has_cls else 'no cls'}, {formatting.counted(registers, 'register')}"
        ),
        Named("Input", f"RGB in [0, 1], minus {list(backbone.mean)}, divided by {list(backbone.std)}"),
    ]
    if repaired:
        rows.insert(2, Named("Fingerprint of the base weights", repaired.change.base_fingerprint))
    return rows


def _folder_of(plan: Plan) -> RunFolder | None:
    """Return the run directory that the user named, if its run has ended."""
    run = plan.repaired.run if plan.repaired else None
    return run if run and run.finished else None


def _run_of(plan: Plan) -> FinishedRun | None:
    """Return the records of that run; None without one, or if an earlier sinder wrote them without a verdict."""
    run = _folder_of(plan)
    summary = run.read_summary() if run else {}
    return FinishedRun(run.path, summary, run.read_config()) if run and "verdict" in summary else None
