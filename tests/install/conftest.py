"""The wheel of the repository, and fresh environments with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("sinder_cli", "plugins", "man", "pyproject.toml", "README.md", "LICENSE")
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a virtual environment with these packages, wheels or folders, and no other."""

    def made(*packages: Path) -> Path:
        root = tmp_path_factory.mktemp("venv")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True, timeout=300)
        purelib = Path(sysconfig.get_path("purelib", vars={"base": str(root), "platbase": str(root)}))
        install = [*PIP, "--ignore-installed", "--prefix", str(root), *map(str, packages)]
        subprocess.run(install, check=True, timeout=300)
        assert (purelib / "sinder_cli").is_dir()
        return root

    return made


@pytest.fixture(scope="session")
def python_of(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Python]:
    """Run an environment's interpreter, far from the repository, with the libraries of this one behind it."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    libraries = tmp_path_factory.mktemp("libraries")
    for path in Path(sysconfig.get_path("purelib")).iterdir():  # all of this environment's, but the editable install
        if "sinder" not in path.name and path.suffix != ".pth":
            (libraries / path.name).symlink_to(path)
    inner = environment | {"PYTHONPATH": str(libraries), "PYTHONDONTWRITEBYTECODE": "1"}

    def interpreter(root: Path) -> Python:
        def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
            command = [str(root / "bin" / "python"), *map(str, arguments)]
            return subprocess.run(
                command, capture_output=True, text=True, env=inner, cwd=elsewhere, timeout=300, check=True
            )

        return run

    return interpreter
