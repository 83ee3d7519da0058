"""Which families of which libraries sinder handles, found out by running them: writes the tables that the docs show.

    python tests/families.py            the families, into docs/backbones.md
    python tests/families.py matrix     the export matrix, into tests/export/MATRIX.md

Each family is a small random model of the library itself, saved by that library. It goes through `check-backbone`,
`predict-defects` and three repair steps; the repaired file is loaded by the library again, whose tokens are compared
with ours.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sinder_cli import Backbone, ModelRequest, SinderError, api, define_torchvision_operators
from sinder_cli.backbone.opening import load_module
from sinder_cli.exporting.targets import ExportSettings, TargetName
from sinder_cli.exporting.verifying import normalized_tokens, relative_difference
from sinder_cli.files import write_text
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.requests import ExportRequest, PredictRequest, RepairRequest

TESTS = Path(__file__).parent
TABLE, MATRIX = TESTS.parent / "docs" / "backbones.md", TESTS / "export" / "MATRIX.md"
BEGIN, END = "<!-- families: made by tests/families.py -->", "<!-- end of families -->"
EAGER = RepairSettings(
    recipe="paper",
    keep="last",
    max_steps=3,
    mask_threshold=0.3,
    min_tokens=1,
    min_gap=0,
    eval_images=2,
    stop_clean_fraction=1,
    lr=0.05,
    workers=0,
)
IMAGES = 2
TARGETS: dict[TargetName, str] = {
    "native": ".safetensors", "transformers": "", "timm": "", "dinov2": ".pth", "torchhub": "", "onnx": ".onnx",
    "adapter": ".safetensors", "diff": ".safetensors",
}  # fmt: skip
EXPORTED = {
    ("official", "DINOv2"), ("official", "DINOv2 with registers"), ("official", "DINOv2 giant (SwiGLU)"),
    ("transformers", "DINOv2"), ("transformers", "DINOv2 with registers"), ("transformers", "DINOv2 with SwiGLU"),
    ("transformers", "ViT"), ("transformers", "DINOv3"), ("transformers", "CLIP"),
    ("timm", "test_vit"), ("timm", "test_vit4"), ("timm", "vit_small_patch14_reg4_dinov2"),
    ("timm", "vit_small_patch16_dinov3"),
}  # fmt: skip

EXAMPLES = {  # a name that a user would give, by the library's own kind
    "dinov2": "hf/facebook/dinov2-large",
    "dinov2_with_registers": "hf/facebook/dinov2-with-registers-large",
    "dinov3_vit": "hf/facebook/dinov3-vitl16-pretrain-lvd1689m",
    "vit": "hf/google/vit-large-patch16-224-in21k",
    "deit": "hf/facebook/deit-base-distilled-patch16-224",
    "vit_mae": "hf/facebook/vit-mae-large",
    "vit_msn": "hf/facebook/vit-msn-large",
    "beit": "hf/microsoft/beit-large-patch16-224",
    "data2vec-vision": "hf/facebook/data2vec-vision-large",
    "clip": "hf/openai/clip-vit-large-patch14",
    "clip_vision_model": "hf/openai/clip-vit-large-patch14",
    "siglip": "hf/google/siglip-large-patch16-384",
    "siglip_vision_model": "hf/google/siglip-large-patch16-384",
    "siglip2": "hf/google/siglip2-large-patch16-naflex",
    "siglip2_vision_model": "hf/google/siglip2-large-patch16-naflex",
    "ijepa": "hf/facebook/ijepa_vith14_1k",
}


@dataclass(frozen=True)
class Case:
    """One family: how users name it, and a small model of it with the library's way to its tokens."""

    family: str
    library: str
    example: str
    request: Callable[[Path], ModelRequest]  # given an empty folder to save it in
    theirs: Callable[[Path, str, torch.Tensor], torch.Tensor]  # run, model, `[B, 3, S, S]` → tokens


def cases() -> Iterator[Case]:
    """All of them, library by library."""
    sys.path.insert(0, str(TESTS / "support"))
    define_torchvision_operators()
    yield from _dinov2_cases()
    yield from _hf_cases()
    yield from _timm_cases()


def _dinov2_cases() -> Iterator[Case]:
    from safetensors.torch import save_file
    from sinder_plugins.dinov2.config import Config, tensor_shapes

    kinds = {
        "DINOv2": Config(width=64, depth=3, hidden=256, grid=5),
        "DINOv2 with registers": Config(width=64, depth=3, hidden=256, grid=5, registers=4),
        "DINOv2 giant (SwiGLU)": Config(width=64, depth=3, hidden=176, grid=5, mlp="SwiGLU"),
    }
    examples = ("dinov2_vitl14", "dinov2_vitl14_reg", "dinov2_vitg14")
    for (family, config), example in zip(kinds.items(), examples, strict=True):

        def request(folder: Path, config: Config = config) -> ModelRequest:
            generator = torch.Generator().manual_seed(0)
            drawn = {name: 0.2 * torch.randn(s, generator=generator) for name, s in tensor_shapes(config).items()}
            norms = {name: 1 + t for name, t in drawn.items() if "norm" in name and name.endswith("weight")}
            save_file(drawn | norms, folder / "model.safetensors")
            return ModelRequest("dinov2_custom", folder / "model.safetensors")

        yield Case(family, "official", example, request, _by_transformers)


def _by_transformers(run: Path, _: str, images: torch.Tensor) -> torch.Tensor:
    """What transformers makes of a repaired DINOv2, converted."""
    from transformers import AutoModel

    with tempfile.TemporaryDirectory() as folder:
        settings = ExportSettings("transformers", verify=False)
        api.export(ExportRequest(ModelRequest(str(run)), settings), Path(folder, "out"))
        tokens: torch.Tensor = AutoModel.from_pretrained(Path(folder, "out")).eval()(images).last_hidden_state
    return tokens


def _hf_cases() -> Iterator[Case]:
    import transformers
    from hf_samples import SAMPLES

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for family, sample in SAMPLES.items():

        def request(folder: Path, sample: Any = sample) -> ModelRequest:
            sample.made().save_pretrained(folder)
            return ModelRequest(f"hf/{folder}")

        kind = sample.configured().model_type
        yield Case(family, "transformers", EXAMPLES[kind], request, _by_own_transformers)


def _by_own_transformers(run: Path, _: str, images: torch.Tensor) -> torch.Tensor:
    """What transformers makes of the repaired file, in its own layout, strictly loaded."""
    sys.path.insert(0, str(TESTS.parent / "sinder_cli" / "exporting" / "checks"))
    from load_transformers import features, loaded

    with tempfile.TemporaryDirectory() as folder:
        api.export(
            ExportRequest(ModelRequest(str(run)), ExportSettings("transformers", verify=False)), Path(folder, "out")
        )
        tokens: torch.Tensor = features(loaded(str(Path(folder, "out"))), images)["last_hidden_state"]
    return tokens


def _timm_cases() -> Iterator[Case]:
    from safetensors.torch import save_file
    from timm_samples import KINDS, NAMES, made

    for kind, (base, _) in KINDS.items():
        name = NAMES[kind]

        def request(folder: Path, name: str = name) -> ModelRequest:
            save_file(made(name).state_dict(), folder / "model.safetensors")
            return ModelRequest(f"timm/{name}", folder / "model.safetensors")

        yield Case(kind.replace("_", " "), "timm", f"timm/{base}", request, _by_timm)


def _named_timm_cases() -> Iterator[Case]:
    """Models under timm's own names, as a process knows them that has only timm."""
    from safetensors.torch import save_file
    from timm_samples import made

    for library, name in sorted(EXPORTED):
        if library == "timm":

            def request(folder: Path, name: str = name) -> ModelRequest:
                save_file(made(name).state_dict(), folder / "model.safetensors")
                return ModelRequest(f"timm/{name}", folder / "model.safetensors")

            yield Case(name, "timm", f"timm/{name}", request, _by_timm)


def _by_timm(run: Path, model: str, images: torch.Tensor) -> torch.Tensor:
    import timm

    name = model.removeprefix("timm/")
    module = timm.create_model(name, num_classes=0, checkpoint_path=run / "model.safetensors").eval()
    tokens: torch.Tensor = module.forward_features(images)
    return tokens


@dataclass(frozen=True)
class Outcome:
    """What came of one family; a step that failed says why."""

    case: Case
    conforms: str
    gap: str
    repaired: str
    difference: str


def examined(case: Case) -> Outcome:
    """Run one family through everything."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "model")
        folder.mkdir()
        request = case.request(folder)
        check = api.check_backbone(request)
        passed = sum(each.outcome == "passed" for each in check.checks)
        failed = f", failed: {', '.join(each.name for each in check.failed)}" if check.failed else ""
        prediction = api.predict_defects(PredictRequest(request, ("cumulative",)))
        gap = f"σ₁/σ₂ {min(prediction.gaps()):.2f}–{max(prediction.gaps()):.2f}"
        run = Path(place, "run")
        api.repair(RepairRequest(request, [str(_pictures(Path(place)))], EAGER), run)
        repaired = api.open_model(ModelRequest(str(run)))
        summary = f"{_changed(run)} weights"
        conforms = f"{passed} of {len(check.checks)}{failed}"
        return Outcome(case, conforms, gap, summary, _difference(case, run, repaired))


def _changed(run: Path) -> int:
    import json

    changed: int = json.loads((run / "summary.json").read_text())["changed_weights"]
    return changed


@torch.inference_mode()
def _difference(case: Case, run: Path, repaired: Backbone) -> str:
    images = torch.randn(
        IMAGES, 3, repaired.image_size, repaired.image_size, generator=torch.Generator().manual_seed(0)
    )
    ours = normalized_tokens(repaired, load_module(repaired), images)
    try:
        difference = relative_difference(case.theirs(run, repaired.name, images), ours)
        return f"{difference:.0e}" if difference else "0"
    except (SinderError, TypeError, ValueError, RuntimeError, SystemExit) as error:
        return f"not comparable: {str(error).splitlines()[0][:60]}"


def _pictures(folder: Path) -> Path:
    import numpy as np
    from PIL import Image

    place = folder / "pictures"
    place.mkdir()
    for seed in range(4):
        noise = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(place / f"{seed}.png")
    return place


def families_table(outcomes: list[Outcome]) -> str:
    """Rows of Markdown."""
    used = ", ".join(f"{name} {version(name)}" for name in ("transformers", "timm", "torch"))
    lines = [
        f"Each family as a small random model of the library itself, saved by that library ({used}, CPU). The",
        "last column is the largest relative difference between a token of ours and of the library's, which has loaded",
        "the repaired file strictly. Pre-trained weights could not be downloaded on the machine that made this table.",
        "",
        "| family | library | for example | `check-backbone` | three repair steps | features differ by |",
        "|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        case = o.case
        lines.append(
            f"| {case.family} | {case.library} | `{case.example}` | {o.conforms} | {o.repaired} | {o.difference} |"
        )
    return "\n".join(lines)


def matrix_table() -> str:
    """Source plugin × target format, the largest relative difference of features in each."""
    used = ", ".join(f"{name} {version(name)}" for name in ("transformers", "timm", "onnxruntime", "torch"))
    lines = [
        "# The export matrix",
        "",
        "Made by `python tests/families.py matrix`: a small random model of each library, repaired for three steps and",
        "exported to every format with `--verify`. A cell is the largest relative difference between a token of ours",
        "and of the library that loaded the export in another process (0: none), or why the format cannot hold it.",
        f"{used}, CPU.",
        "",
        "| from | " + " | ".join(TARGETS) + " |",
        "|---" * (len(TARGETS) + 1) + "|",
    ]
    for case in [*cases(), *_named_timm_cases()]:
        if (case.library, case.family) not in EXPORTED:
            continue
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "model")
            folder.mkdir()
            run = Path(place, "run")
            api.repair(RepairRequest(case.request(folder), [str(_pictures(Path(place)))], EAGER), run)
            cells = [_exported(run, target, Path(place, f"out_{target}{suffix}")) for target, suffix in TARGETS.items()]
        lines.append(f"| {case.family} ({case.library}) | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def _exported(run: Path, target: TargetName, out: Path) -> str:
    try:
        check = api.export(ExportRequest(ModelRequest(str(run)), ExportSettings(target)), out).check
    except SinderError as error:
        return f"refused: {error.why}"
    if not check.verified:
        return f"unchecked: {check.sentence}"
    return "0" if not check.difference else f"{check.difference:.0e}"


def main(arguments: list[str]) -> None:
    """Write one of the tables."""
    warnings.simplefilter("ignore")
    if arguments == ["matrix"]:
        write_text(MATRIX, matrix_table())
        return
    outcomes = []
    for case in cases():
        outcome = examined(case)
        print(case.library, case.family, outcome.conforms, outcome.repaired, outcome.difference, file=sys.stderr)
        outcomes.append(outcome)
    text = TABLE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_text(TABLE, f"{before}{BEGIN}\n\n{families_table(outcomes)}\n\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
