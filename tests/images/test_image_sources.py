"""The fingerprints of lists of images."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sinder_cli.images.decoding import UnreadableImageError
from sinder_cli.images.sources import DrawnImages, ImageFiles


def test_the_fingerprint_of_files_changes_with_names_sizes_and_order(tmp_path: Path) -> None:
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    a.touch()
    b.touch()
    first = ImageFiles((a, b)).fingerprint()
    assert ImageFiles((a, b)).fingerprint() == first
    others = {ImageFiles((b, a)).fingerprint(), ImageFiles((a,)).fingerprint()}
    a.write_bytes(b"x")
    others.add(ImageFiles((a, b)).fingerprint())
    a.unlink()
    others.add(ImageFiles((a, b)).fingerprint())
    assert len(others | {first}) == 5


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [grow, touch])
def test_a_file_that_changes_after_listing_is_refused(change: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)
    files = ImageFiles((path,))
    first = files.fingerprint()
    assert files.load(0).size == (4, 4)
    change(path)
    with pytest.raises(UnreadableImageError, match="has changed since the run began"):
        files.load(0)
    assert files.fingerprint() == first


def test_files_that_cannot_be_looked_at_have_a_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    odd = ImageFiles((Path("nul\0.png"), tmp_path / "a.png" / "b.png", tmp_path / ("long" * 100)))
    assert len(odd.fingerprint()) == 64


def test_the_fingerprint_of_drawn_images_changes_with_one_pixel() -> None:
    image = Image.new("RGB", (4, 4))
    changed = image.copy()
    changed.putpixel((1, 2), (0, 0, 1))
    assert DrawnImages((image,), "drawn").fingerprint() != DrawnImages((changed,), "drawn").fingerprint()
