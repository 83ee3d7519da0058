"""Folders as users find them, and how they are opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from hf_samples import SAMPLES

from sinder_cli import Backbone, ModelRequest, api


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    """The library's own progress bars and advice are not what is tested."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder that the library has saved a sample in; the same for all tests, which leave it alone."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("saved") / name.replace(" ", "_")
            SAMPLES[name].made().save_pretrained(folders[name])  # type: ignore[operator]
        return folders[name]

    return folder_of


@pytest.fixture
def opened() -> Callable[..., Backbone]:
    """Open a folder as a model."""

    def open_folder(folder: Path, **options: Any) -> Backbone:
        return api.open_model(ModelRequest(f"hf/{folder}", **options))

    return open_folder
