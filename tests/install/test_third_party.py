"""A plugin of somebody else: a distribution of its own, installed beside the wheel, and shown in the documents."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "third_party"
MODULE = FOLDER / "sinder_nano.py"
Python = Callable[..., subprocess.CompletedProcess[str]]

MAKE_WEIGHTS = """
import sys, torch, sinder_nano
from safetensors.torch import save_file

torch.manual_seed(0)
save_file({name: tensor + 0.1 * torch.rand_like(tensor) for name, tensor in sinder_nano.build().state_dict().items()},
          sys.argv[1])
"""
MAKE_IMAGES = """
import sys, numpy
from PIL import Image

for index in range(4):
    noise = numpy.random.default_rng(index).integers(0, 256, (112, 112, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(f"{sys.argv[1]}/{index}.png")
"""


def test_the_documents_show_the_very_files() -> None:
    readme = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    for path, language in ((MODULE, "python"), (FOLDER / "pyproject.toml", "toml")):
        assert f"```{language}\n{path.read_text(encoding='utf-8')}```\n" in readme


def test_it_is_one_short_module_that_imports_sinder_cli_alone() -> None:
    lines = MODULE.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 60
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert imports == ["from typing import Any", "import sinder_cli as sinder"]  # and no torch for a listing
    assert [path.name for path in FOLDER.glob("*.py")] == [MODULE.name]


@pytest.mark.slow
def test_its_types_are_strictly_right(tmp_path: Path) -> None:
    """The contract is typed: a mistake in a plugin is told by its type checker."""

    def strictly(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mypy", "--config-file=", "--strict", "--follow-imports=silent"]
        return subprocess.run(
            [*command, f"--cache-dir={tmp_path / 'cache'}", str(path)], capture_output=True, text=True, check=False
        )

    checked = strictly(MODULE)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    wrong = tmp_path / "sinder_wrong.py"
    text = MODULE.read_text(encoding="utf-8")
    wrong.write_text(text.replace("has_cls=False", "has_cls=None").replace("norm=norm1", "norm=value"), "utf-8")
    assert strictly(wrong).stdout.count("arg-type") == 2


@pytest.fixture(scope="module")
def python(
    fresh: Callable[..., Path],
    wheel: Path,
    python_of: Callable[[Path], Python],
    tmp_path_factory: pytest.TempPathFactory,
) -> Python:
    """The interpreter of an environment with the wheel and the plugin, built from a copy of its folder."""
    source = tmp_path_factory.mktemp("nano") / "source"
    shutil.copytree(FOLDER, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    return python_of(fresh(wheel, source))


@pytest.fixture(scope="module")
def weights(python: Python, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "nano.safetensors"
    python("-c", MAKE_WEIGHTS, path)
    return path


def sinder(python: Python, *arguments: str | Path) -> str:
    try:
        return python("-m", "sinder_cli", *arguments).stdout
    except subprocess.CalledProcessError as ended:
        if (ended.returncode, arguments[0]) != (1, "repair"):  # three steps on noise need not help: "not improved"
            raise
        return str(ended.stdout)


@pytest.mark.slow
def test_it_is_found_and_listed_without_torch(python: Python) -> None:
    rows = json.loads(sinder(python, "backbones"))
    (row,) = [row for row in rows if row["plugin"] == "nano"]
    assert (row["name"], row["distribution"], row["available"]) == ("nano_vit", "sinder-nano", True)
    listing = "import sys; from sinder_cli import api; api.backbones(); print('torch' in sys.modules)"
    assert python("-c", listing).stdout == "False\n"


@pytest.mark.slow
def test_it_conforms(python: Python, weights: Path) -> None:
    document = json.loads(sinder(python, "check-backbone", "nano_vit", "--weights", weights))
    assert {check["name"]: check["detail"] for check in document["checks"] if check["outcome"] != "passed"} == {}
    assert (document["model"], document["conforms"], len(document["checks"])) == ("nano_vit", True, 13)


@pytest.mark.slow
def test_it_is_predicted_and_repaired_like_a_built_in_one(python: Python, weights: Path, tmp_path: Path) -> None:
    prediction = json.loads(sinder(python, "predict-defects", "nano_vit", "--weights", weights))
    assert [block["block"] for block in prediction["blocks"]] == list(range(6))
    python("-c", MAKE_IMAGES, tmp_path)
    steps = (
        "--recipe",
        "paper",
        "--keep",
        "last",
        "--min-tokens",
        "3",
        "--max-steps",
        "3",
        "--image-size",
        "112",
        "--mask-threshold",
        "1",
        "--min-gap",
        "0",
        "--window",
        "2",
    )
    run = tmp_path / "run"
    summary = json.loads(
        sinder(python, "repair", "nano_vit", "--weights", weights, "--data", tmp_path, "--out", run, *steps)
    )
    assert (summary["model"], summary["steps"], summary["changed_weights"] > 0) == ("nano_vit", 3, True)
    exported = json.loads(sinder(python, "export", run, "--to", "native", "--out", tmp_path / "nano.safetensors"))
    assert exported["verified"]
