"""What an installer leaves: a wheel in an environment of its own, and the editable install that `make` makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PARTS = ("sinder_cli", "plugins", "man", "pyproject.toml", "README.md", "LICENSE")
PAGES = {"sinder.1", *(f"sinder-{name}.1" for name in ("analyze", "backbones", "export", "predict-defects", "repair"))}
FORMATS = {"sinder-analysis.5"}
WHERE = "import sinder_cli, sinder_plugins, importlib.util as u; print(sinder_cli.__file__, u.find_spec('plugins'))"
Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what the repository holds, so that no build folder is left in it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel, and the libraries of this one behind it."""
    root = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True, timeout=300)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(root), "platbase": str(root)}))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*install, "--prefix", str(root), str(wheel)], check=True, timeout=300)
    assert (purelib / "sinder_cli").is_dir()
    return root


@pytest.fixture(scope="module")
def python(installed: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Python:
    """Run the new environment's interpreter, far from the repository."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    libraries = tmp_path_factory.mktemp("libraries")
    for path in Path(sysconfig.get_path("purelib")).iterdir():  # all of this environment's, but the editable install
        if "sinder" not in path.name and path.suffix != ".pth":
            (libraries / path.name).symlink_to(path)
    inner = environment | {"PYTHONPATH": str(libraries), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(installed / "bin" / "python"), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=inner, cwd=elsewhere, timeout=300, check=True
        )

    return run


def test_the_wheel_holds_what_is_needed_at_run_time_and_no_folder_named_plugins(wheel: Path) -> None:
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
    assert {"sinder_cli/py.typed", "sinder_cli/report/pages/base.html.jinja"} <= inside


def test_the_installed_package_is_not_the_repository(python: Python, installed: Path) -> None:
    where, plugins = python("-c", WHERE).stdout.split()
    assert Path(where).is_relative_to(installed)
    assert plugins == "None"


def test_the_installed_command_finds_the_plugins_by_their_entry_points(installed: Path, python: Python) -> None:
    script = installed / "bin" / "sinder"
    assert os.access(script, os.X_OK)
    rows = json.loads(python(str(script), "backbones").stdout)
    assert {row["plugin"]: row["available"] for row in rows} == {"demo": True, "dinov2": True, "hf": True}
    assert {row["distribution"] for row in rows} == {"sinder-cli"}


def test_the_installed_command_works_far_from_the_repository(installed: Path, python: Python) -> None:
    document = json.loads(python("-m", "sinder_cli", "predict-defects", "demo_vit", "--stage", "cumulative").stdout)
    assert document["settled_from"] == {"cumulative": 5}
    templates = "import sinder_cli.report.pages.templates as t; print(t.html_template('analysis/page.html.jinja').name)"
    assert python("-c", templates).stdout.split() == ["analysis/page.html.jinja"]
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
