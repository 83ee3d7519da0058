"""Target `hf-repo`: the folder of `transformers` with what a repository on a hub needs besides.

That is a licence, which is asked for where the weights are not the official ones; the base model's repository, if it
is known; the name that the folder will have on the hub; large files marked for LFS; no path of the machine that wrote
it, no name of a local file, and no picture of the user's photographs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sinder_cli.errors import BadInputError, UsageError
from sinder_cli.events import Noted
from sinder_cli.exporting import transformers
from sinder_cli.exporting.licences import FILE, LICENCES, OTHER
from sinder_cli.exporting.origins import PLACEHOLDER, private_names, sources
from sinder_cli.exporting.targets import Plan
from sinder_cli.files import write_json

LARGE = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
ORIGINS = ("_name_or_path", "name_or_path")  # where transformers notes the folder that a configuration came from
TEXTS = (".json", ".md", "")  # suffixes of the files that are searched for paths


def _require(plan: Plan) -> None:
    if plan.backbone.license is None:
        what = f"cannot export {plan.backbone.name} to hf-repo"
        whose = "" if plan.own_weights else ": these are not known to be the official weights"
        why = f"the licence of the base model is not known{whose}"
        raise UsageError(what, why, "name it with --license, such as apache-2.0")
    if plan.settings.license is None:
        words = f"licence {plan.backbone.license}: that of the official weights of {plan.backbone.name}; name another"
        plan.emit(Noted(f"{words} with --license"))
    if plan.backbone.license not in LICENCES - {OTHER}:
        todo = f"before upload, put its text into {FILE}, its name into README.md"
        plan.emit(Noted(f"licence {plan.backbone.license}: {todo}"))
    if plan.settings.repo_id is None:
        plan.emit(Noted(f"the card names the repository {PLACEHOLDER}: name yours with --repo-id, or edit README.md"))
    transformers.TARGET.require(plan)


def _write(plan: Plan, path: Path) -> None:
    transformers.TARGET.write(plan, path)
    for file in path.glob("*.json"):
        document = json.loads(file.read_text(encoding="utf-8"))
        if (cleaned := without_origins(document)) != document:
            write_json(file, cleaned)
    (path / ".gitattributes").write_text(LARGE, encoding="utf-8")


def without_origins(document: Any) -> Any:
    """Return a configuration without the folders that it, or a part of it, was once read from."""
    if isinstance(document, dict):
        return {name: without_origins(part) for name, part in document.items() if name not in ORIGINS}
    return [without_origins(part) for part in document] if isinstance(document, list) else document


def _finish(plan: Plan, path: Path) -> None:
    """Raise `BadInputError` if a text in the folder names a folder of this machine, or a local file."""
    leaking = {str(place) for place in _private(plan) if len(place.parts) > 2}  # `/` and `/home` say nothing
    leaking |= set(private_names(plan))
    for file in sorted(each for each in path.rglob("*") if each.is_file() and each.suffix in TEXTS):
        text = file.read_text(encoding="utf-8", errors="replace")
        if found := sorted(place for place in leaking if place in text):
            what = f"export of {plan.backbone.name} failed"
            raise BadInputError(what, f"{file.name} would publish the local name {found[0]}", "report it")


def _private(plan: Plan) -> Iterator[Path]:
    """Yield folders whose names are nobody's business: the user's, the working one, and those of run and weights."""
    yield from (Path.home(), Path.cwd())
    run = plan.repaired.run if plan.repaired else None
    yield from (place.resolve().parent for place in sources(plan) if place.exists())
    if run is not None:
        yield run.path.resolve().parent


TARGET = replace(
    transformers.TARGET,
    summary="a folder for transformers' `from_pretrained`, ready for upload to a hub",
    write=_write,
    require=_require,
    finish=_finish,
    options=transformers.TARGET.options | {"--repo-id"},
    public=True,
)
