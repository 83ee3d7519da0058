"""A Hugging Face folder with shards is read lazily and strictly, and no shard is read from outside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sinder_cli.backbone import sources
from sinder_cli.backbone.sources import Shards, open_checkpoint
from sinder_cli.errors import BadInputError, NoInputError, SinderError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MAP = {"b": SECOND, "a": FIRST, "c": FIRST}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {name: torch.randn(3, 2) for name in "abc"}


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    """Three tensors in two shards, with their index."""
    made = tmp_path / "made"
    made.mkdir()
    save_file({name: tensors[name] for name in "ac"}, made / FIRST)
    save_file({"b": tensors["b"]}, made / SECOND)
    write_index(made, MAP)
    return made


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", [".", "model.safetensors.index.json"])
def test_a_folder_and_its_index_give_all_tensors(folder: Path, tensors: dict[str, Tensor], name: str) -> None:
    source = open_checkpoint(folder / name)
    assert list(source.infos) == ["b", "a", "c"]
    assert source.infos["a"].shape == (3, 2)
    read = source.read(["c", "b"])
    assert read.keys() == {"b", "c"}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.items())


def test_only_the_shards_that_are_asked_are_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(folder)
    opened = []
    real = sources._opened

    def counted(path: Path) -> object:
        opened.append(path.name)
        return real(path)

    monkeypatch.setattr(sources, "_opened", counted)
    source.read(["a", "c"])
    assert opened == [FIRST]


def test_one_file_goes_before_an_index(folder: Path) -> None:
    save_file({"alone": torch.ones(1)}, folder / "model.safetensors")
    assert list(open_checkpoint(folder).infos) == ["alone"]


def test_shards_may_lie_in_a_folder_below(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / "deep").mkdir()
    (folder / FIRST).rename(folder / "deep" / FIRST)
    write_index(folder, MAP | {"a": f"deep/{FIRST}", "c": f"deep/{FIRST}"})
    assert torch.equal(open_checkpoint(folder).read(["a"])["a"], tensors["a"])


def test_a_name_that_its_shard_lacks_is_reported(folder: Path) -> None:
    write_index(folder, MAP | {"d": SECOND, "e": SECOND})
    with pytest.raises(BadInputError, match=f"d and 1 more are not in {SECOND}, contrary to the index"):
        open_checkpoint(folder)


def test_a_shard_tensor_that_the_index_lacks_is_reported(folder: Path) -> None:
    write_index(folder, {"b": SECOND, "a": FIRST})
    with pytest.raises(BadInputError, match=f"c is in {FIRST}, contrary to the index"):
        open_checkpoint(folder)


def test_a_tensor_that_two_shards_have_is_reported(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({"b": tensors["b"], "a": tensors["a"]}, folder / SECOND)
    with pytest.raises(BadInputError, match=f"a is in {SECOND}, contrary to the index"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / SECOND).unlink()
    with pytest.raises(NoInputError, match=f"there is no shard {SECOND}"):
        open_checkpoint(folder)


def leaving_by_link(folder: Path) -> str:
    (folder / SECOND).rename(folder.parent / "other.safetensors")
    (folder / SECOND).symlink_to(folder.parent / "other.safetensors")
    return SECOND


def leaving_by_a_linked_folder(folder: Path) -> str:
    (folder / "deep").symlink_to(folder.parent)
    return "deep/other.safetensors"


LEAVING: dict[str, Callable[[Path], str]] = {
    "up": lambda _: "../other.safetensors",
    "down and up": lambda _: "deep/../../other.safetensors",
    "absolute": lambda folder: str(folder.parent / "other.safetensors"),
    "link": leaving_by_link,
    "link of a folder": leaving_by_a_linked_folder,
}


@pytest.mark.parametrize("leave", LEAVING.values(), ids=LEAVING)
def test_a_shard_outside_the_folder_is_refused(
    folder: Path, leave: Callable[[Path], str], tensors: dict[str, Tensor]
) -> None:
    save_file({"b": tensors["b"]}, folder.parent / "other.safetensors")
    write_index(folder, MAP | {"b": leave(folder)})
    with pytest.raises(BadInputError, match="is outside the folder") as refusal:
        open_checkpoint(folder)
    assert refusal.value.exit_code == 65


def test_links_of_a_snapshot_in_the_hub_cache_are_followed(folder: Path, tensors: dict[str, Tensor]) -> None:
    repository = folder.parent / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "c0ffee", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob{number}")
    source = open_checkpoint(snapshot)
    assert isinstance(source, Shards)
    assert torch.equal(source.read(["b"])["b"], tensors["b"])


BAD_INDEXES = {
    "no JSON": ("{", "it is no index of shards"),
    "a list": ("[]", "it is no index of shards"),
    "no map": ('{"metadata": {}}', "it is no index of shards"),
    "a map of nothing": ('{"weight_map": {}}', "no table of tensors"),
    "a map of numbers": ('{"weight_map": {"a": 1}}', "shard 1 is no .safetensors file"),
    "a pickle": ('{"weight_map": {"a": "pytorch_model.bin"}}', "is no .safetensors file"),
}


@pytest.mark.parametrize(("text", "why"), BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_a_file_that_is_no_index_is_refused(folder: Path, text: str, why: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SinderError, match=why) as refusal:
        open_checkpoint(folder)
    assert refusal.value.exit_code == 65
