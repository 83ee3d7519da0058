"""Photographs that scikit-image brings."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest


def copied_photographs(folder: Path, names: Iterable[str]) -> Path:
    """Copy these photographs into `folder` and return it; skip the test where scikit-image is not installed."""
    skimage = pytest.importorskip("skimage")
    for name in names:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder / name)
    return folder
