"""The images of a repair: which of them train, which judge, and which each step takes.

All of it depends on nothing but the scan, the settings and the number of the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING

import torch

from sinder_cli.distributed import ALONE, Ranks
from sinder_cli.errors import BadInputError
from sinder_cli.escaping import printable
from sinder_cli.events import Emit
from sinder_cli.images.loading import cycled, load_in_order, readable, require_some, sampled, shuffled
from sinder_cli.images.preprocessing import Preprocessing
from sinder_cli.images.processes import worker_count
from sinder_cli.images.sources import CHANGED, ImageSource
from sinder_cli.repairing.scan import ImageOutliers, Scan
from sinder_cli.repairing.settings import RepairSettings

if TYPE_CHECKING:
    from torch import Tensor


MOST_UNREADABLE = 0.01  # of all images
LEAST_GUARD = 4  # images, if as many can be spared or drawn
MOST_ELSEWHERE = 64  # images with kinds of defects that the guard does not show, examined at the end


@dataclass(frozen=True)
class Chosen:
    """The images that train and those that judge, by their places in the source."""

    training: tuple[int, ...]  # in the order of a pass; empty if there is nothing to repair
    guard: tuple[int, ...]
    also_trained: int  # number of guard images that are trained on, since no other image has such a defect
    drawn: int  # number of guard images that the program drew
    unjudged: tuple[ImageOutliers, ...]  # defective ones whose kind of defect is on no image of the guard


def chosen_images(scan: Scan, total: int, given: int, settings: RepairSettings) -> Chosen:
    """Choose the images to train on and to be judged by, of `total` images, the first of which the user has given.

    If not only defective images are visited, those that the scan has not looked at are trained on too.
    """
    guard, also = judging(scan, given, settings)
    judged = {image.kind for image in scan.images if image.place in set(guard)}
    others = [image for image in scan.images if image.blocks and image.kind not in judged]
    return Chosen(
        training=tuple(_training(scan, set(guard) - set(also), total, settings)),
        guard=tuple(guard),
        also_trained=len(also),
        drawn=sum(at >= given for at in guard),
        unjudged=tuple(others[at] for at in sampled(len(others), MOST_ELSEWHERE, settings.seed)),
    )


def _training(scan: Scan, held: set[int], total: int, settings: RepairSettings) -> Sequence[int]:
    """Return the places of the images to train on, without those that are held back for the guard."""
    if scan.healthy:
        return ()
    if settings.visit == "all":
        offered = [place for place in range(total) if place not in held]
        unfit = {image.place for image in scan.images if image.flooded}
        return [place for place in offered if place not in unfit] or offered
    return rarest_first(to_train_on([image for image in scan.images if image.place not in held]))


def to_train_on(images: Sequence[ImageOutliers]) -> list[ImageOutliers]:
    """Return the images with a defect, without flooded ones if another image has the same kind of defect.

    The neighbours of a token in a flooded image are outlying themselves: no target to learn.
    """
    kinds = {image.kind for image in images if image.blocks and not image.flooded}
    return [image for image in images if image.blocks and not (image.flooded and image.kind in kinds)]


def rarest_first(images: Sequence[ImageOutliers]) -> list[int]:
    """Return the places of the images, one of each kind in turn, beginning with the rarest kind."""
    kinds: dict[tuple[int, ...], list[int]] = {}
    for image in images:
        kinds.setdefault(image.kind, []).append(image.place)
    queues = sorted(kinds.values(), key=len)
    return [queue[at] for at in range(max(map(len, queues), default=0)) for queue in queues if at < len(queue)]


def judging(scan: Scan, given: int, settings: RepairSettings) -> tuple[list[int], list[int]]:
    """Choose the images of the guard, by place; and those of them to train on too, as no others exist.

    They are images that the user gave, if there are two or more of them, and drawn ones up to four. If none of them has
    a defect, a defective image is added, which is then lost for training unless it is the only one of its kind. Flooded
    images are left out if there are others: for them, the inpainted original is no yardstick.
    """
    fit = [image for image in scan.images if not image.flooded] or list(scan.images)
    own = [image for image in fit if image.place < given]
    drawn = [image for image in fit if image.place >= given]
    sizes = guard_sizes(len(own), len(drawn), settings.eval_images)
    chosen = [
        offered[at].place
        for offered, size in zip((own, drawn), sizes, strict=True)
        for at in guarded([image.kind for image in offered], size, settings.seed)
    ]
    if scan.healthy:
        return chosen or [image.place for image in scan.images[:1]], []
    defective = [image for image in fit if image.blocks] or [image for image in scan.images if image.blocks]
    if {image.place for image in defective} & set(chosen):
        return chosen, []
    shown = Counter(image.kind for image in defective)
    commonest = max(defective, key=lambda image: shown[image.kind])
    return [*chosen, commonest.place], [commonest.place] if shown[commonest.kind] == 1 else []


def guard_size(count: int, asked: int | None) -> int:
    """Return how many of `count` images the guard takes: `asked`, or a tenth, at least 4, at most 64; at most half."""
    wanted = asked if asked is not None else min(max(LEAST_GUARD, round(0.1 * count)), 64)
    return min(wanted, count // 2)


def guard_sizes(given: int, drawn: int, asked: int | None) -> tuple[int, int]:
    """Return how many of the user's images the guard takes, and how many drawn ones.

    Drawn images are used alone if none of the user's can be spared; unless `asked` is set, they also make up for fewer
    than `LEAST_GUARD` images of the user.
    """
    own = guard_size(given, asked)
    if own == 0:
        return 0, guard_size(drawn, asked)
    more = max(0, LEAST_GUARD - own) if asked is None else 0
    return own, min(guard_size(drawn, asked), more)


def guarded(kinds: Sequence[tuple[int, ...]], size: int, seed: int = 0) -> list[int]:
    """Return the sorted indices of the guard's images: every kind, and at least half with a defect if possible.

    Within a kind they are drawn by the seed: consecutive images may show the same thing.

    `kinds` are the kinds of all images, empty for one without a defect. At least half of the images of a kind are left
    for training, so that a kind with a single image is not on the guard.
    """
    by_kind: dict[tuple[int, ...], list[int]] = {}
    for index in islice(shuffled(len(kinds), seed), len(kinds)):
        kind = kinds[index]
        by_kind.setdefault(kind, []).append(index)
    clean = by_kind.pop((), [])
    offered = [indices[: len(indices) // 2] for _, indices in sorted(by_kind.items(), key=lambda each: len(each[1]))]
    defective = [group[at] for at in range(max(map(len, offered), default=0)) for group in offered if at < len(group)]
    share = sum(map(len, by_kind.values())) / max(1, len(kinds))
    wanted = min(len(defective), max(round(size * share), (size + 1) // 2))
    taken = defective[:wanted]
    rest = [*clean[: len(clean) if not by_kind else max(1, len(clean) // 2)], *defective[wanted:]]
    return sorted([*taken, *rest[: size - len(taken)]])


@dataclass(frozen=True)
class Batch:
    """The images of one step on one rank."""

    pixels: Tensor  # [b, 3, H, W]
    names: tuple[str, ...]
    places: tuple[int, ...]  # in the source


def step_batches(
    source: ImageSource,
    preprocess: Preprocessing,
    settings: RepairSettings,
    steps_done: int,
    unreadable: dict[str, str],
    emit: Emit,
    ranks: Ranks = ALONE,
) -> Iterator[Batch]:
    """Yield batches without end, beginning with the batch of step `steps_done` + 1.

    Step s takes the images `(s − 1)·B … s·B − 1` of endlessly repeated passes; a rank gets every `ranks.size`-th of
    them. Passes over all images are shuffled, passes over defective images keep their order. Images that cannot be
    decoded are named in a warning once, added to `unreadable`, and missing from their batch (b < B, even 0).
    """
    B = settings.batch_size
    done = steps_done * B
    order = shuffled(len(source), settings.seed, done) if settings.visit == "all" else cycled(len(source), done)
    mine = (index for at, index in zip(count(), order, strict=False) if at % B % ranks.size == ranks.rank)
    loaded = load_in_order(source, preprocess, mine, worker_count(settings.workers, ranks.local_size))
    empty = torch.zeros(0, 3, preprocess.size, preprocess.size)
    while True:
        share = list(islice(loaded, len(range(ranks.rank, B, ranks.size))))
        images = list(readable(share, unreadable, emit))
        pixels = torch.stack([image for _, image in images]) if images else empty
        places = {image.name: image.index for image in share}
        yield Batch(pixels, tuple(name for name, _ in images), tuple(places[name] for name, _ in images))


def forget_mended(source: ImageSource, preprocess: Preprocessing, unreadable: dict[str, str]) -> None:
    """Drop from `unreadable` what can be decoded now: the disk may have been missing when an earlier process tried.

    Names that no image has any more are dropped too: a renamed image is named in a warning when a step cannot read it.
    """
    names = set(map(source.name, range(len(source))))
    for name in unreadable.keys() - names:
        del unreadable[name]
    doubted = [index for index in range(len(source)) if source.name(index) in unreadable]
    for image in load_in_order(source, preprocess, doubted):
        if image.pixels is not None:
            del unreadable[image.name]


def require_readable(source: ImageSource, unreadable: dict[str, str], strict: bool) -> None:
    """Raise `BadInputError` if too many images cannot be decoded: more than 1 %, or any if `strict`.

    A single one is accepted whatever its share, unless an image has become unreadable since the run began.
    """
    require_some(len(source) - len(unreadable), len(unreadable))
    lost = [name for name, problem in unreadable.items() if problem.startswith(CHANGED)]
    most = 0 if strict else int(MOST_UNREADABLE * len(source))
    if len(unreadable) > (most if lost or strict else max(1, most)):
        named = printable(next(reversed(lost or list(unreadable))))
        why = f"{len(unreadable)} of {len(source)} cannot be read, among them {named}"
        raise BadInputError(
            "too many images are missing or broken", why, "repair the files, or leave them out of a new run"
        )
