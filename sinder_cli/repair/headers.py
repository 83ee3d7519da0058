"""The header of a file that `--adapter` names."""

from __future__ import annotations

from pathlib import Path

from sinder_cli.errors import BadInputError, NoInputError

REMEDY = "give the adapter.safetensors of a run"


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; nothing else of it is read.

    Raises `NoInputError` where there is no file and `BadInputError` for one that is no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    what = f"cannot read adapter {path}"
    if not path.is_file():
        raise NoInputError(what, "it is a folder" if path.is_dir() else "there is no such file", REMEDY)
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise BadInputError(what, str(error), REMEDY) from error
