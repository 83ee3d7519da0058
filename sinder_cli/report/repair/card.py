"""The model card of a repaired backbone, the `README.md` of a run directory."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.files import public_model, public_place, public_source
from sinder_cli.report import formatting
from sinder_cli.report.pages.templates import markdown_template
from sinder_cli.report.repair import facts

if TYPE_CHECKING:
    from sinder_cli.repairing.results import RepairResult

WRITTEN_WITH_THE_CARD = ("pictures", "report.html", "README.md")
FILES = {
    "model.safetensors": "the repaired weights, in the key order, names and dtypes of the input",
    "adapter.safetensors": "the changes of the singular values alone, with the fingerprint of their weights",
    "summary.json": "before and after in numbers",
    "config.json": "resolved settings, versions, and fingerprints of the weights and the image list",
    "outliers.json": "defective tokens of each image in the original, by block",
    "metrics.jsonl": "one line a step: images, first defective block, loss, what was moved, share of clean images",
    "evaluations.jsonl": "one line a look at the images that it is judged on: outlying tokens, cosines",
    "images.jsonl": "one line an image file: its place, size, time and hash when the repair began",
    "checkpoints": "the state of the repair, to go on from",
    "pictures": "the first image and its maps, before and after, and `words.json`: what each shows",
    "report.html": "before and after in pictures, in one offline file",
    "README.md": "this card",
}


def render_card(result: RepairResult) -> str:
    """The card in Markdown; it says only what the result holds."""
    return markdown_template("repair/card.md.jinja").render(
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
    """The files of a run directory that are there, or are written together with the card."""
    return [
        formatting.Named(name, meaning)
        for name, meaning in FILES.items()
        if name in WRITTEN_WITH_THE_CARD or (folder / name).exists()
    ]
