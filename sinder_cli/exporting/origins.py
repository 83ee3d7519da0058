"""Whose weights an export holds, and what of their origin may be told to the world.

A plugin knows the licence of the checkpoint that it gets itself, not of a file that somebody names. DINOv2's official
files are known by their SHA-256 as well, wherever they lie.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.exporting.targets import REPOSITORY
from sinder_cli.files import WEIGHTS_SUFFIXES, public_model, public_source, sha256_of
from sinder_cli.repairing.folder import RunFolder

if TYPE_CHECKING:
    from sinder_cli.backbone.hooks import ModelRequest
    from sinder_cli.exporting.targets import Plan

# of the files below https://dl.fbaipublicfiles.com/dinov2, as finegrain-ai/refiners lists them for its conversions
OFFICIAL_FILES = {
    "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9": "dinov2_vits14",
    "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb": "dinov2_vits14_reg",
    "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73": "dinov2_vitb14",
    "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71": "dinov2_vitb14_reg",
    "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428": "dinov2_vitl14",
    "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51": "dinov2_vitl14_reg",
    "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3": "dinov2_vitg14",
    "746ecb8c6301c645c5c855be91687d274587d6e48fdaec4a729753160b34a283": "dinov2_vitg14_reg",
}
REPOSITORIES = {  # of the Hub: the official weights of these models
    f"dinov2_vit{letter}14{suffix}": f"facebook/dinov2-{registers}{size}"
    for letter, size in (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant"))
    for suffix, registers in (("", ""), ("_reg", "with-registers-"))
}
PLACEHOLDER = "OWNER/NAME"  # in a card, of a repository that was not named
MOST_RUNS = 100  # a run of a run of a run …


def are_the_plugins_own(request: ModelRequest, model: str) -> bool:
    """Return True if the weights, before any repair, are those that the plugin itself gets for the model."""
    named: Path | None = request.weights
    run = RunFolder(Path(request.model))
    for _ in range(MOST_RUNS):
        if named is not None:
            return _is_official_file(Path(named), model)
        if not run.is_run:
            return not run.path.is_absolute()  # it would be a run that is gone
        call = _call(run)
        if call is None:
            return False
        place, weights = call
        named, run = None if weights is None else Path(weights), RunFolder(Path(place))
    return False


def _call(run: RunFolder) -> tuple[str, str | None] | None:
    """Return the model and the weights that a run was called with; None if its records do not say so."""
    call = run.read_config().get("call")
    if not isinstance(call, dict) or "model" not in call or "weights" not in call:
        return None
    return str(call["model"]), None if call["weights"] is None else str(call["weights"])


def _is_official_file(path: Path, model: str) -> bool:
    known = model in OFFICIAL_FILES.values() and path.is_file()
    return known and OFFICIAL_FILES.get(sha256_of(path)) == model


def base_repository(plan: Plan) -> str | None:
    """Return the repository of the base model on the Hub: the one that the user named, else the known one."""
    if plan.settings.base_model:
        return plan.settings.base_model
    if is_of_a_hub(plan):
        return plan.backbone.name.removeprefix("hf/")
    return REPOSITORIES.get(plan.backbone.name) if plan.own_weights else None


def is_of_a_hub(plan: Plan) -> bool:
    """Return True for `hf/OWNER/NAME` that is no local folder, nor was one where a run read it."""
    plugin, _, place = plan.backbone.name.partition("/")
    if plugin != "hf" or not REPOSITORY.fullmatch(place) or Path(place).is_dir():
        return False
    return not any(source.parent.as_posix().endswith(f"/{place}") for source in sources(plan))


def _is_local(plan: Plan) -> bool:
    """Return True for a model that is a folder of this machine."""
    return plan.backbone.name.startswith("hf/") and not is_of_a_hub(plan)


def sources(plan: Plan) -> list[Path]:
    """Return the files that the weights were read from, before and after a repair."""
    run = plan.repaired.run if plan.repaired else None
    labels = [plan.backbone.weights.source.label]
    labels += [run.repaired_weights()[0]] if run and run.config.is_file() else []
    parts = [part.removeprefix("adapted by ") for label in labels for part in label.split(", ")]
    return [Path(part) for part in parts if Path(part).suffix in WEIGHTS_SUFFIXES or Path(part).exists()]


def told_model(plan: Plan, public: bool) -> str:
    """Return the model's name for a folder that is written; no local folder's name is in one for the world."""
    backbone = plan.backbone
    if not public or not _is_local(plan):
        return public_model(backbone.name)
    return plan.settings.base_model or f"Vision Transformer, {backbone.depth} blocks of width {backbone.width}"


def told_source(plan: Plan, public: bool) -> str:
    """Return where the weights were read from; for the world no file's name, only whose they are."""
    if not public:
        return public_source(plan.backbone.weights.source.label)
    known = plan.own_weights and not _is_local(plan)
    whose = f"the original weights of {plan.backbone.name}" if known else "weights of the exporter's own"
    return f"{whose}, repaired" if plan.repaired else whose


def private_names(plan: Plan) -> list[str]:
    """Return names of local files and folders that are in no folder for the world.

    A name that is in every such folder, as `model.safetensors`, tells nothing.
    """
    usual = {"model.safetensors", "adapter.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}
    files = [source.name for source in sources(plan) if source.suffix in WEIGHTS_SUFFIXES]
    model = plan.backbone.name
    local = [public_model(model), model] if _is_local(plan) else []
    return [name for name in (*files, *local) if name not in usual]
