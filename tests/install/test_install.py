"""What an installer leaves: a wheel in an environment of its own, and the editable install that `make` makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
COMMANDS = (
    "analyze", "backbones", "check-backbone", "demo", "doctor", "evaluate", "export", "man", "predict-defects",
    "repair", "runs",
)  # fmt: skip
PAGES = {
    "sinder.1",
    *(f"sinder-{name}.1" for name in COMMANDS),
}
FORMATS = {"sinder-analysis.5"}
WHERE = "import sinder_cli, sinder_plugins, importlib.util as u; print(sinder_cli.__file__, u.find_spec('plugins'))"
Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(fresh: Callable[..., Path], wheel: Path) -> Path:
    """A fresh virtual environment with the wheel, and the libraries of this one behind it."""
    return fresh(wheel)


@pytest.fixture(scope="module")
def python(installed: Path, python_of: Callable[[Path], Python]) -> Python:
    """The new environment's interpreter."""
    return python_of(installed)


def test_the_wheel_holds_just_what_is_needed_at_run_time(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    data = {name.split(".data/data/")[1] for name in names if ".data/data/" in name}
    assert data == {f"share/man/man{page[-1]}/{page}" for page in PAGES | FORMATS}
    inside = {name for name in names if ".data/" not in name and ".dist-info/" not in name}
    stored = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in (("sinder_cli", "sinder_cli"), ("plugins", "sinder_plugins"))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert inside == stored
    assert {"sinder_cli/py.typed", "sinder_cli/report/templates/base.html.jinja"} <= inside


def test_the_installed_package_is_not_the_repository(python: Python, installed: Path) -> None:
    where, plugins = python("-c", WHERE).stdout.split()
    assert Path(where).is_relative_to(installed)
    assert plugins == "None"


def test_the_installed_command_finds_the_plugins_by_their_entry_points(installed: Path, python: Python) -> None:
    script = installed / "bin" / "sinder"
    assert os.access(script, os.X_OK)
    rows = json.loads(python(str(script), "backbones").stdout)
    assert {row["plugin"]: row["available"] for row in rows} == {"demo": True, "dinov2": True, "hf": True, "timm": True}
    assert {row["distribution"] for row in rows} == {"sinder-cli"}


def test_the_installed_command_works_far_from_the_repository(installed: Path, python: Python) -> None:
    document = json.loads(python("-m", "sinder_cli", "predict-defects", "demo_vit", "--stage", "cumulative").stdout)
    assert document["settled_from"] == {"cumulative": 5}
    templates = "import sinder_cli.report.templates as t; print(t.html_template('analysis.html.jinja').name)"
    assert python("-c", templates).stdout.split() == ["analysis.html.jinja"]
    assert {path.name for path in (installed / "share" / "man").rglob("*.?")} == PAGES | FORMATS


def editable() -> Distribution | None:
    """This environment's install of the package, if it is one of the repository itself."""
    for found in distributions(name="sinder-cli"):  # the egg-info of a build in the working folder is one as well
        source = json.loads(found.read_text("direct_url.json") or "{}")
        if source.get("dir_info", {}).get("editable"):
            return found
    return None


@pytest.mark.skipif(editable() is None, reason="the package is not installed in editable mode")
def test_the_editable_install_finds_the_same_things_from_elsewhere(environment: dict[str, str], tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300, check=True
        ).stdout

    where, plugins = run("-c", WHERE).split()
    assert Path(where).is_relative_to(ROOT)
    assert plugins == "None"
    rows = json.loads(run("-m", "sinder_cli", "backbones"))
    assert {"demo", "dinov2"} <= {row["plugin"] for row in rows if row["available"]}
    assert run("-c", "from sinder_cli.cli.manpage import pages; print(*sorted(pages()))").split() == sorted(
        PAGES | FORMATS
    )


def test_an_index_would_take_wheel_and_source(wheel: Path, tmp_path: Path) -> None:
    """Metadata, and the README as it is rendered there."""
    pytest.importorskip("twine")
    copied, dist = tmp_path / "source", tmp_path / "dist"
    left_out = (".*", "tests", "docs", "site", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(*left_out))
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(dist), str(copied)]
    subprocess.run(build, capture_output=True, text=True, check=True, timeout=300)
    [source] = dist.iterdir()
    run = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("PASSED") == 2
