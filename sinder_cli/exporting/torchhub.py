"""Target `torchhub`: a folder for `torch.hub.load(DIR, NAME, source="local")` that needs nothing but torch."""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_cli.errors import BadInputError
from sinder_cli.exporting.targets import CARD_OPTIONS, ExportCheck, ExportTarget, Loading, Plan
from sinder_cli.exporting.verifying import all_tokens, verify_features

if TYPE_CHECKING:
    from sinder_cli.backbone.contract import Backbone

HUBCONF = '''"""{model} for torch.hub; it needs nothing but torch."""

from pathlib import Path as _Path

import torch

from {package}.model import build as _build

dependencies = ["torch"]


def {name}(pretrained=True):
    """Return {model}: images `[B, 3, H, W]` → {returned}.

    Images are RGB in [0, 1], minus {mean}, divided by {std}; H and W are
    multiples of {patch}. {tokens}, then come the patches row by row.
    Without `pretrained`, the weights are the initial ones of the module.
    """
    module = _build()
    if pretrained:
        path = _Path(__file__).parent / "{name}.pth"
        module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    return module.eval()
'''
OFFICIAL_HUBCONF = '''"""{model} for torch.hub; it needs nothing but torch."""

from enum import Enum as _Enum
from pathlib import Path as _Path

import torch

from {package}.model import build as _build

dependencies = ["torch"]


class _Weights(_Enum):
    LVD142M = "LVD142M"  # the official name; here it stands for the weights in this folder


def {name}(*, pretrained=True, weights=_Weights.LVD142M, **kwargs):
    """Return {model}: images `[B, 3, H, W]` → {returned}.

    Images are RGB in [0, 1], minus {mean}, divided by {std}; H and W are
    multiples of {patch}. {tokens}, then come the patches row by row.
    Keywords are those of facebookresearch/dinov2. Without `pretrained`, the weights are
    the initial ones of the module.
    """
    if getattr(weights, "name", weights) != "LVD142M":
        raise ValueError(f"there are no weights {{weights!r}} in this folder; leave the keyword out")
    try:
        module = _build(**kwargs)
    except TypeError as error:
        raise TypeError(f"{name}() {{error}}") from None
    if pretrained:
        path = _Path(__file__).parent / "{name}.pth"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if state["pos_embed"].shape != module.pos_embed.shape:
            raise ValueError(
                "img_size does not fit the weights: leave it out, any image of whole patches is taken; "
                "or give pretrained=False"
            )
        module.load_state_dict(state)
    elif hasattr(module, "init_weights"):
        module.init_weights()
    return module.eval()
'''


def hub_name(model: str) -> str:
    """Return a model's name as the name of a function: hf/owner/name-of → hf_owner_name_of."""
    return re.sub(r"\W|^(?=\d)", "_", model)


def _require(plan: Plan) -> None:
    source = plan.backbone.hub_source
    what = f"cannot export {plan.backbone.name} to torchhub"
    if source is None:
        why = "its plugin provides no source of the module that needs only torch"
        raise BadInputError(what, why, "use another format")
    files = source()
    if "model.py" not in files:
        raise BadInputError(what, "its plugin's source has no model.py", "tell its author")
    if strangers := foreign_imports(files):
        raise BadInputError(what, f"its plugin's source imports {', '.join(strangers)}", "tell its author")


def foreign_imports(files: Mapping[str, str]) -> list[str]:
    """Return the packages that Python files import, except torch, the standard library and one another."""
    found: set[str] = set()
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").partition(".")[0])
    return sorted(found - set(sys.stdlib_module_names) - {"torch"})


def _write(plan: Plan, path: Path) -> None:
    from sinder_cli.exporting.native import write_torch_file

    backbone = plan.backbone
    assert backbone.hub_source is not None
    files = backbone.hub_source()
    # torch.hub keeps packages by name: one of the same name from another model would be used instead
    package = f"sinder_hub_{hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:8]}"
    (path / package).mkdir(parents=True)
    for name, text in {"__init__.py": "", **files}.items():
        (path / package / name).write_text(text, encoding="utf-8")
    (path / "hubconf.py").write_text(_hubconf(backbone, package), encoding="utf-8")
    weights = backbone.weights
    infos = {name: weights.info(name) for name in weights.names}
    write_torch_file(path / f"{hub_name(backbone.name)}.pth", infos, (t for _, t in weights.stream(infos)))


def _hubconf(backbone: Backbone, package: str) -> str:
    registers = backbone.prefix_tokens - backbone.has_cls
    tokens = f"tokens after the final norm, `[B, {backbone.prefix_tokens} + patches, {backbone.width}]`"
    cls = f"cls after the final norm, `[B, {backbone.width}]`; `forward_features` has all tokens"
    first = ["cls comes first"] if backbone.has_cls else []
    first += [f"{registers} registers come {'next' if first else 'first'}"] if registers else []
    return (OFFICIAL_HUBCONF if _is_official(backbone) else HUBCONF).format(
        model=backbone.name,
        package=package,
        name=hub_name(backbone.name),
        returned=cls if _is_official(backbone) else tokens,
        mean=list(backbone.mean),
        std=list(backbone.std),
        patch=backbone.patch_size,
        tokens=", ".join(first) or "There is neither cls nor a register",
    )


def _is_official(backbone: Backbone) -> bool:
    """Return True if the module is called as DINOv2's official ones are, which return cls."""
    files = backbone.hub_source() if backbone.hub_source else {}
    return any("def forward_features(" in text for text in files.values())


def _verify(plan: Plan, path: Path) -> ExportCheck:
    return verify_features(plan, path, "load_torchhub.py", ("torch",), all_tokens)


def _loading(plan: Plan, folder: str) -> Loading:
    name, width = hub_name(plan.backbone.name), plan.backbone.width
    call = f'model = torch.hub.load({folder!r}, {name!r}, source="local")'
    if not _is_official(plan.backbone):
        shape = f"[B, {plan.backbone.prefix_tokens} + patches, {width}]"
        return Loading("import torch", call, f"tokens = model(images)  # [B, 3, H, W] → {shape}")
    return Loading(
        "import torch",
        call,
        f"cls = model(images)  # [B, 3, H, W] → [B, {width}]\n"
        f'patches = model.forward_features(images)["x_norm_patchtokens"]  # [B, patches, {width}]',
    )


TARGET = ExportTarget(
    kind="folder",
    summary="a folder for `torch.hub.load(…, source='local')`, which needs only torch",
    write=_write,
    verify=_verify,
    loading=_loading,
    require=_require,
    options=frozenset({"--dtype"}) | CARD_OPTIONS,
)
