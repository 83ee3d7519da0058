"""The images of a step: which they are depends on the seed and the number of the step alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import Pictures

from sinder_cli.errors import BadInputError
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.sources import CHANGED, ImageFiles
from sinder_cli.repairing.choosing import forget_mended, require_readable, step_batches
from sinder_cli.repairing.settings import RepairSettings

PLAIN = Preprocessing(4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
COUNT = 7
BROKEN = {2, 5}


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    """Files that tell their number by their colour; two are broken."""
    paths = []
    for number in range(COUNT):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (4, 4), (10 * number,) * 3).save(path)
        if number in BROKEN:
            path.write_bytes(b"broken")
        paths.append(path)
    return ImageFiles(tuple(paths))


def numbers(files: ImageFiles, steps: int, done: int = 0, **settings: object) -> list[list[int]]:
    """The numbers of the images of the next steps."""
    chosen = RepairSettings.model_validate({"recipe": "paper", "workers": 0} | settings)
    batches = step_batches(files, PLAIN, chosen, done, {}, lambda _: None)
    return [[round(image[0, 0, 0].item() * 25.5) for image in batch.pixels] for batch in islice(batches, steps)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_a_run_that_goes_on_sees_the_same_images(files: ImageFiles, batch_size: int, workers: int) -> None:
    whole = numbers(files, 12, batch_size=batch_size)
    for done in (0, 1, 5, 11):
        assert numbers(files, 12 - done, done, batch_size=batch_size, workers=workers) == whole[done:]


def test_the_order_does_not_depend_on_the_batch_size(files: ImageFiles) -> None:
    one, three = (sum(numbers(files, 30 // size, batch_size=size), []) for size in (1, 3))  # noqa: RUF017
    assert one == three


def test_defective_images_are_visited_in_their_order_again_and_again(files: ImageFiles) -> None:
    whole = [n for n in range(COUNT) if n not in BROKEN]
    assert sum(numbers(files, 2 * COUNT, visit="defective"), []) == whole * 2  # noqa: RUF017
    assert numbers(files, 5, 3, visit="defective") == numbers(files, 8, visit="defective", seed=1)[3:]


def test_the_names_of_a_batch_are_those_of_its_pixels(files: ImageFiles) -> None:
    settings = RepairSettings.model_validate({"recipe": "paper", "workers": 0, "batch_size": 3})
    for batch in islice(step_batches(files, PLAIN, settings, 0, {}, lambda _: None), 7):
        seen = [round(image[0, 0, 0].item() * 25.5) for image in batch.pixels]
        assert batch.names == tuple(files.name(number) for number in seen)


def test_another_seed_is_another_order(files: ImageFiles) -> None:
    assert numbers(files, 12, seed=0) == numbers(files, 12, seed=0) != numbers(files, 12, seed=1)


def test_an_unreadable_image_shifts_no_other(files: ImageFiles) -> None:
    seen = numbers(files, 7, batch_size=2)
    assert sorted(sum(seen, [])) == sorted(2 * [n for n in range(COUNT) if n not in BROKEN])  # noqa: RUF017
    assert {len(batch) for batch in seen} <= {0, 1, 2}
    assert [] in numbers(files, 7)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: os.utime(path, ns=(1, 1)),
        lambda path: Image.new("RGB", (40, 40)).save(path),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
    ],
    ids=["vanished", "newer", "larger", "torn"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_or_changes_is_left_out(
    files: ImageFiles, change: Callable[[Path], None], workers: int
) -> None:
    change(files.paths[3])
    unreadable: dict[str, str] = {}
    settings = RepairSettings(workers=workers, batch_size=COUNT)
    (batch,) = islice(step_batches(files, PLAIN, settings, 0, unreadable, lambda _: None), 1)
    assert len(batch.pixels) == len(batch.names) == COUNT - len(BROKEN) - 1
    assert set(unreadable) == {str(files.paths[number]) for number in (*BROKEN, 3)}
    assert unreadable[str(files.paths[3])]


def test_a_batch_of_unreadable_images_is_empty() -> None:
    settings = RepairSettings(batch_size=2)
    (batch,) = islice(step_batches(Pictures(None, None), PLAIN, settings, 0, {}, lambda _: None), 1)
    assert batch.pixels.shape == (0, 3, 4, 4)
    assert batch.names == ()


@pytest.mark.parametrize(
    ("images", "unreadable", "strict", "passes"),
    [
        (2, 1, False, True),  # one alone that was broken from the beginning ends no run
        (2, 2, False, False),
        (3, 2, False, False),
        (199, 2, False, False),
        (200, 2, False, True),
        (200, 3, False, False),
        (1000, 10, False, True),
        (1000, 11, False, False),
        (1000, 1, True, False),
        (1000, 0, True, True),
    ],
)
def test_one_in_a_hundred_may_be_unreadable_unless_strict(
    images: int, unreadable: int, strict: bool, passes: bool
) -> None:
    source = Pictures(*[torch.zeros(3, 4, 4)] * images)
    named = {source.name(index): "it is broken" for index in range(unreadable)}
    if passes:
        require_readable(source, named, strict)
        return
    with pytest.raises(BadInputError) as caught:
        require_readable(source, named, strict)
    assert caught.value.exit_code == 65
    assert f"{unreadable}" in str(caught.value)


@pytest.mark.parametrize(
    ("images", "broken", "lost", "passes"),
    [(12, 0, 1, False), (12, 1, 1, False), (99, 0, 1, False), (100, 0, 1, True), (100, 1, 1, False), (200, 1, 1, True)],
)
def test_at_most_one_in_a_hundred_images_may_be_lost(images: int, broken: int, lost: int, passes: bool) -> None:
    source = Pictures(*[torch.zeros(3, 4, 4)] * images)
    named = {source.name(index): f"{CHANGED}: No such file" for index in range(lost)}
    named |= {source.name(lost + index): "it is broken" for index in range(broken)}
    if passes:
        require_readable(source, named, strict=False)
        return
    with pytest.raises(
        BadInputError, match=f"{broken + lost} of {images} cannot be read, among them picture {lost - 1}"
    ):
        require_readable(source, named, strict=False)


def test_a_vanished_file_is_told_from_one_never_there(files: ImageFiles, tmp_path: Path) -> None:
    files = ImageFiles((*files.paths, tmp_path / "never.png"))
    files.paths[3].unlink()
    unreadable: dict[str, str] = {}
    list(islice(step_batches(files, PLAIN, RepairSettings(workers=0), 0, unreadable, lambda _: None), COUNT + 1))
    lost = {name for name, problem in unreadable.items() if problem.startswith(CHANGED)}
    assert lost == {str(files.paths[3])}
    assert len(unreadable) == len(BROKEN) + 2


def test_an_image_that_can_be_read_again_counts_no_longer(files: ImageFiles) -> None:
    unreadable = {files.name(number): "its disk was away" for number in (1, 2)} | {"renamed": "its disk was away"}
    forget_mended(files, PLAIN, unreadable)
    assert set(unreadable) == {files.name(2)}
