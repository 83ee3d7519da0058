"""Images with a depth map each, as people have them on disk: NYUd as BTS lays it out, or two folders of equal names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sinder_cli.errors import BadInputError, NoInputError, SinderError, UnavailableError, UsageError
from sinder_cli.evaluation.contract import Dataset, Places
from sinder_cli.evaluation.layouts import one_folder, pairs_by_stem, split_by_seed, split_folders, without_partner
from sinder_cli.events import Warned, tracked
from sinder_cli.images.decoding import UnreadableImageError, upright_size
from sinder_cli.images.sources import ImageFiles, find_images
from sinder_cli.memory import is_out_of_memory

if TYPE_CHECKING:
    import numpy as np

DepthMap: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"  # metres, [H, W]
Pair = tuple[Path, Path]  # an image, and its depth
LEAST = 3  # images to split: one to train on, and two to test
WANTED = ("depth", "images with depth")
ENOUGH_USED = 0.99  # of the pixels with depth: below it, a warning
SUFFIXES = (".png", ".npy", ".exr")
NYU_IMAGE, NYU_DEPTH = "rgb_", "sync_depth_"  # how BTS names the files of NYUd
NYU_LISTS = ("nyu_train.txt", "nyu_test.txt")
INTEGER_PNG = ("I;16", "I;16B", "I", "L")  # modes in which Pillow opens PNGs of one channel
EXR_CHANNELS = ("Z", "Y", "depth", "R")  # the first of these, where a file has several


def depth_pairs(
    places: Places,
    train_share: float,
    scale: float | None,
    limits: tuple[float, float],
    valid: Callable[[Path, DepthMap], Any],
) -> Dataset:
    """Read images with depth; the truth of an image is the path of its depth map.

    NYUd: `train/` and `test/`, `sync/` and `official_splits/test/`, or `nyu_train.txt` and `nyu_test.txt`, with
    `SCENE/rgb_00000.jpg` and `SCENE/sync_depth_00000.png`; or `images/` and `depth/` with the same names, with or
    without splits. What has no splits is split by the seed, `train_share` to train on.
    All depth maps are read once: `valid` returns the mask of the pixels of one that count, which lie within `limits`,
    in metres; a warning says so if others are more than a few.
    Raises `NoInputError` for a missing folder, and `BadInputError`, which names the file, for an image without depth
    and the reverse, sizes that differ, depth that cannot be read or has no valid pixel, or too few images to split.
    """
    train, test, how = _both_splits(places, train_share)
    pairs = tracked([*train, *test], places.emit, "depth", len(train) + len(test), "maps")
    counts = [_check(image, depth, scale, limits, valid) for image, depth in pairs]
    known, used = (sum(column) for column in zip(*counts, strict=True))
    if used < ENOUGH_USED * known:
        outside, (low, high) = f"{100 * (1 - used / known):.0f} % of the pixels with depth", limits
        places.emit(Warned(f"{outside} lie outside {low:g} to {high:g} m (depth.min_depth, depth.max_depth): left out"))
    note = f"{len(train):,} images to train on, {len(test):,} to test; {how}"
    return Dataset(
        ImageFiles(tuple(image for image, _ in test)),
        [depth for _, depth in test],
        ImageFiles(tuple(image for image, _ in train)),
        [depth for _, depth in train],
        note=note,
    )


def _both_splits(places: Places, train_share: float) -> tuple[list[Pair], list[Pair], str]:
    """Return the pairs to train on and to test, and how they were found."""
    folder = one_folder(places.data, "--data", *WANTED)
    if places.train:
        train = one_folder(places.train, "--train", *WANTED)
        return _pairs(train), _pairs(folder), f"from {train} and {folder}"
    if folder.joinpath("nyu_depth_v2").is_dir():
        folder = folder / "nyu_depth_v2"
    lists = [folder / name for name in NYU_LISTS]
    if all(path.is_file() for path in lists):
        return _listed(lists[0]), _listed(lists[1]), f"by the lists in {folder}"
    official = folder / "official_splits"
    if official.is_dir():
        every = folder / "sync"
        train = every if every.is_dir() else official / "train"
        return _pairs(train), _pairs(official / "test"), f"from {train} and {official / 'test'}"
    first, second = split_folders(folder)
    if first and second:
        return _pairs(first), _pairs(second), f"from {first} and {second}"
    first, second = split_folders(folder / "images")
    if first and second:
        depth = folder / "depth"
        found = [_by_stem(images, depth / images.name) for images in (first, second)]
        return found[0], found[1], f"from {first} and {second}"
    return *_split_pairs(_pairs(folder), folder, train_share, places.seed), f"{folder}, split by the seed"


def _pairs(folder: Path) -> list[Pair]:
    """Return the pairs below a folder of one split."""
    images, depth = folder / "images", folder / "depth"
    if images.is_dir() or depth.is_dir():
        return _by_stem(images, depth)
    return _nyu_pairs(folder)


def _nyu_pairs(folder: Path) -> list[Pair]:
    """Return the pairs of files that are named as those of NYUd, wherever they lie in a folder."""
    images = [path for path in _images(folder) if path.name.startswith(NYU_IMAGE)]
    depths = {path.with_suffix(""): path for path in _depths(folder) if path.name.startswith(NYU_DEPTH)}
    if not images and not depths:
        looked = "images/ and depth/ with the same names, or rgb_00000.jpg with sync_depth_00000.png"
        raise NoInputError(f"no images with depth in {folder}", f"looked for {looked}", "check --data")
    pairs = []
    for image in images:
        depth = depths.pop(image.with_name(NYU_DEPTH + image.stem.removeprefix(NYU_IMAGE)), None)
        if depth is None:
            raise without_partner(image, "depth", image.parent)
        pairs.append((image, depth))
    for depth in depths.values():
        raise without_partner(depth, "image", depth.parent)
    return pairs


def _by_stem(images: Path, depth: Path) -> list[Pair]:
    """Return the pairs of two folders whose files have the same names but for their ends."""
    for folder in (images, depth):
        if not folder.is_dir():
            raise NoInputError(f"cannot read {folder}", "there is no such folder", "images/ and depth/ belong together")
    return pairs_by_stem((images, _images(images)), (depth, _depths(depth)), "depth")


def _images(folder: Path) -> list[Path]:
    """Return the images below a folder, without depth maps that lie beside them."""
    try:
        paths = find_images([str(folder)]).paths
    except NoInputError as error:
        raise NoInputError(f"no images in {folder}", "images with depth are read from it", "check --data") from error
    return [path for path in paths if not path.name.startswith(NYU_DEPTH)]


def _depths(folder: Path) -> list[Path]:
    hidden = lambda path: any(part.startswith(".") for part in path.relative_to(folder).parts)  # noqa: E731
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not hidden(path))


def _listed(path: Path) -> list[Pair]:
    """Return the pairs of a list of lines `/SCENE/rgb_00000.jpg /SCENE/sync_depth_00000.png FOCAL`.

    Lines with `None` in the place of the depth are passed over, as the published protocol does.
    """
    pairs = []
    for number, line in enumerate(path.read_text(errors="surrogateescape").splitlines(), 1):
        words = line.split()
        if not words or words[1:2] == ["None"]:
            continue
        if len(words) < 2:
            raise BadInputError(
                f"cannot read {path}", f"line {number} names no depth", "write IMAGE DEPTH in each line"
            )
        image, depth = (path.parent / word.lstrip("/\\") for word in words[:2])
        for file in (image, depth):
            if not file.is_file():
                raise BadInputError(f"cannot use {file}", f"{path} names it, but it is not there", "remove the line")
        pairs.append((image, depth))
    if not pairs:
        raise BadInputError(f"cannot use {path}", "it lists no images with depth", "write IMAGE DEPTH in each line")
    return sorted(pairs)


def _split_pairs(pairs: list[Pair], folder: Path, train_share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    if len(pairs) < LEAST:
        images = ", ".join(str(image) for image, _ in pairs)
        raise BadInputError(f"cannot split {folder}", f"it has {images} alone", f"give {LEAST} images or more")
    train, test = split_by_seed(pairs, train_share, f"{seed} depth", LEAST - 1)
    return sorted(train), sorted(test)


def _check(
    image: Path,
    path: Path,
    scale: float | None,
    limits: tuple[float, float],
    valid: Callable[[Path, DepthMap], Any],
) -> tuple[int, int]:
    """Return the number of pixels with depth, and of those within the limits.

    Raises `BadInputError` for a depth map that does not belong to its image, or has no valid pixel.
    """
    try:
        width, height = upright_size(image)
    except UnreadableImageError as error:
        raise BadInputError(f"cannot read {image}", str(error), "replace or remove it") from error
    depth = read_depth(path, scale)
    if depth.shape != (height, width):
        why = f"it has {depth.shape[1]}×{depth.shape[0]} pixels, and {image} has {width}×{height}"
        raise BadInputError(f"cannot use {path}", why, "give both the same size")
    known = depth[(depth > 0) & (depth < float("inf"))]
    if not valid(path, depth).any():
        seen = f"; it has {known.min():.4g} to {known.max():.4g}" if known.size else ""
        raise BadInputError(f"cannot use {path}", f"no pixel has a depth within the range{seen}", "check the scale")
    return known.size, int(((known > limits[0]) & (known < limits[1])).sum())


def read_depth(path: Path, scale: float | None) -> DepthMap:
    """Return a depth map in metres; pixels without depth are 0, negative or not finite.

    `scale` is the number of stored units in a metre; only floating-point files need none.
    Raises `UsageError` for integers without a scale, `UnavailableError` for an EXR without the package that reads it,
    and `BadInputError` for what is no depth map.
    """
    import numpy as np

    read = {".npy": _from_npy, ".exr": _from_exr}.get(path.suffix.lower(), _from_png)
    try:
        stored = read(path)
    except SinderError:
        raise
    except Exception as error:  # Pillow, NumPy and OpenEXR raise many kinds on bad files
        if is_out_of_memory(error):
            raise
        why = str(error) or type(error).__name__
        raise BadInputError(f"cannot read {path}", why, "replace or remove it") from error
    if stored.ndim != 2 or stored.size == 0 or stored.dtype.kind not in "iuf":
        raise BadInputError(f"cannot use {path}", f"it is {stored.dtype} of shape {stored.shape}", "give one channel")
    if stored.dtype.kind != "f" and scale is None:
        raise UsageError(
            f"no scale for {path}",
            "it has integers, which are not metres",
            "give the units in a metre, such as --set depth.scale=1000 (NYUd), or 256 (KITTI)",
        )
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(stored / (scale or 1.0), dtype=np.float32)


def _from_png(path: Path) -> np.ndarray[Any, Any]:
    import numpy as np
    from PIL import Image as pillow

    with pillow.open(path, formats=["PNG"]) as file:
        if file.mode not in INTEGER_PNG:
            raise BadInputError(f"cannot use {path}", f"it is {file.mode}", "give a PNG of one channel")
        file.load()
        return np.asarray(file)


def _from_npy(path: Path) -> np.ndarray[Any, Any]:
    import numpy as np

    stored = np.load(path, allow_pickle=False)
    return stored[..., 0] if stored.ndim == 3 and stored.shape[-1] == 1 else stored


def _from_exr(path: Path) -> np.ndarray[Any, Any]:
    import numpy as np

    try:
        import OpenEXR
    except ImportError as error:
        why = "EXR is read by OpenEXR, which is not installed"
        raise UnavailableError(f"cannot read {path}", why, "pip install 'sinder-cli[evaluate]'") from error
    with OpenEXR.File(str(path), separate_channels=True) as file:
        channels = {name: np.array(channel.pixels) for name, channel in file.channels().items()}
    if len(channels) == 1:
        return next(iter(channels.values()))
    named = [channels[name] for name in EXR_CHANNELS if name in channels]
    if not named:
        why = f"it has the channels {', '.join(channels)}"
        raise BadInputError(f"cannot use {path}", why, f"name the depth {EXR_CHANNELS[0]}")
    return named[0]
