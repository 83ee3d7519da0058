"""Features of images as files: one safetensors each, with the tokens of the last block after the final norm."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sinder_cli.analysis.tokens import BlockTokens, Subject
from sinder_cli.backbone.contract import Backbone
from sinder_cli.backbone.sources import infos_of
from sinder_cli.backbone.storing import write_safetensors
from sinder_cli.errors import CannotCreateError
from sinder_cli.escaping import printable
from sinder_cli.files import make_folder, output_error, require_creatable_folder

MOST_BYTES = 200  # of a file name without its suffix: the longer name of a temporary file must fit, too
TAKEN = "after the last block and the final norm"


def require_new_features(folder: Path) -> None:
    """Check, before any work, that the folder is empty or can be created. Raises `CannotCreateError` otherwise."""
    if folder.is_dir() and any(folder.iterdir()):
        raise CannotCreateError(f"cannot create {folder}", "it is not empty", "choose another --features, or remove it")
    require_creatable_folder(folder)


def file_names(images: Iterable[str]) -> dict[str, str]:
    """Return a file name for each image: its stem, cut to a length that a file system can hold.

    Of two equal names, the second gets the ending -2.
    """
    names: dict[str, str] = {}
    used: set[str] = set()
    for image in images:
        stem = _cut(re.sub(r"[\x00-\x1f\\]+", "-", PurePosixPath(image).stem) or "image")
        chosen, count = stem, 1
        while chosen.casefold() in used:  # some file systems do not distinguish A from a
            count += 1
            chosen = f"{stem}-{count}"
        used.add(chosen.casefold())
        names[image] = f"{chosen}.safetensors"
    return names


def _cut(stem: str) -> str:
    while len(stem.encode("utf-8", "surrogateescape")) > MOST_BYTES:
        stem = stem[:-1]
    return stem


@dataclass(frozen=True)
class FeatureFiles:
    """The folder that features are written to, and the file name of each image."""

    folder: Path
    names: Mapping[str, str]
    metadata: Mapping[str, str]  # of every file

    @classmethod
    def made(cls, folder: Path, images: Iterable[str], backbone: Backbone) -> FeatureFiles:
        """Return the files for features of one backbone; the folder is created if it does not exist."""
        try:
            make_folder(folder)
        except OSError as error:
            raise output_error(folder, error) from error
        about = {"model": printable(backbone.name), "fingerprint": backbone.weights.fingerprint(), "taken": TAKEN}
        return cls(folder, file_names(images), about)

    def write(self, names: Sequence[str], subject: Subject, last: BlockTokens) -> None:
        """Write a batch, each image's file whole or not at all: `patches` `[h, w, N]` and `cls` `[N]`, float32.

        `last` are the tokens before the final norm. A model without cls has no `cls`. The metadata contain the model,
        the fingerprint of its weights and the image.
        """
        backbone = subject.backbone
        _, h, w, _ = last.patches.shape
        tokens = backbone.finish(subject.module, last.stream).float()  # [B, T, N]
        patches = tokens[:, backbone.prefix_tokens :].unflatten(1, (h, w)).cpu()
        cls = tokens[:, 0].cpu() if backbone.has_cls else None
        for at, name in enumerate(names):
            found = {"patches": patches[at], **({"cls": cls[at]} if cls is not None else {})}
            metadata = {**self.metadata, "image": printable(name)}
            write_safetensors(self.folder / self.names[name], infos_of(found), found.values(), metadata)
