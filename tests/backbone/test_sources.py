"""Checkpoints are read lazily, strictly, and never unpickled freely."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sinder_cli import BadInputError, MemoryTensors, NoInputError
from sinder_cli.backbone import sources
from sinder_cli.backbone.sources import TensorInfo, open_checkpoint


class Harmful:
    """A pickle of this runs code where pickles are trusted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def drawn() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "z.weight": torch.randn(4, 3, generator=generator),
        "a.bias": torch.randn(5, generator=generator).half(),
        "m.count": torch.tensor(7),
        "m.empty": torch.zeros(0, 3, dtype=torch.bfloat16),
    }


def assert_holds(path: Path, tensors: dict[str, Tensor]) -> None:
    source = open_checkpoint(path)
    assert dict(source.infos) == {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        found = source.read([name])[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_safetensors_are_read_with_their_dtypes(tmp_path: Path) -> None:
    save_file(drawn(), tmp_path / "a.safetensors")
    assert_holds(tmp_path / "a.safetensors", drawn())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_torch_files_old_and_new_are_read_in_their_order(suffix: str, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    torch.save(drawn(), path, _use_new_zipfile_serialization=not legacy)
    assert_holds(path, drawn())
    assert list(open_checkpoint(path).infos) == list(drawn())


def test_nested_dictionaries_are_flattened_and_only_tensors_are_kept(tmp_path: Path) -> None:
    nested = {"epoch": 3, "args": {"name": "vit"}, "teacher": {"backbone": {"w": torch.ones(2)}}, "w": torch.zeros(1)}
    torch.save(nested, tmp_path / "a.pth")
    assert_holds(tmp_path / "a.pth", {"teacher.backbone.w": torch.ones(2), "w": torch.zeros(1)})


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    save_file(drawn(), tmp_path / "a.safetensors")
    torch.save(drawn(), tmp_path / "a.pth")
    for source in (
        open_checkpoint(tmp_path / "a.safetensors"),
        open_checkpoint(tmp_path / "a.pth"),
        MemoryTensors("memory", drawn()),
    ):
        source.read(["z.weight"])["z.weight"].zero_()
        assert torch.equal(source.read(["z.weight"])["z.weight"], drawn()["z.weight"])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_pickle_with_objects_is_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "a.pth"
    torch.save({"w": torch.ones(2), "model": Harmful(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadInputError, match="pickles are never trusted") as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 65
    assert not trace.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused_by_name(name: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / name
    big = drawn() | {"big": torch.ones(1000)}
    if path.suffix == ".pth":
        torch.save(big, path)
    else:
        save_file(big, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(BadInputError) as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 65
    assert str(path) in str(caught.value)


def test_a_legacy_file_that_is_truncated_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(drawn(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInputError):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\x80", b"PK\x03\x04", bytes(100)])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_what_is_no_checkpoint_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInputError, match="cannot read weights"):
        open_checkpoint(tmp_path / name)


def test_a_safetensors_header_that_lies_about_its_length_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    for length in (len(header) + 1000, 1 << 62):
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(BadInputError):
            open_checkpoint(tmp_path / "a.safetensors")


def test_a_file_without_named_tensors_is_refused(tmp_path: Path) -> None:
    for stored in ({}, {"epoch": 3}, [torch.ones(2)]):
        torch.save(stored, tmp_path / "a.pth")
        with pytest.raises(BadInputError, match="it holds no named tensors"):
            open_checkpoint(tmp_path / "a.pth")


def test_missing_files_folders_and_unknown_suffixes_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="there is no such file"):
        open_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(NoInputError, match="the folder has neither model"):
        open_checkpoint(tmp_path)
    (tmp_path / "a.h5").write_bytes(b"x")
    with pytest.raises(BadInputError, match="neither a safetensors file nor"):
        open_checkpoint(tmp_path / "a.h5")


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "a.pth.tar", "A.PTH", "weights", "a.safetensors", "a.h5"])
def test_what_a_file_holds_decides_and_not_its_suffix(name: str, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    torch.save(tensors, tmp_path / name)
    assert open_checkpoint(tmp_path / name).read(["a"])["a"].tolist() == [0, 1, 2]
    save_file(tensors, tmp_path / name)
    assert open_checkpoint(tmp_path / name).read(["a"])["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("https://a.org/b.pth", "fetch it first"),
        ("~/b.pth", "the shell expands ~"),
        ("runs/*.pth", "no file matches this pattern"),
        ("b.pth", "give --weights a file of safetensors"),
    ],
)
def test_a_missing_file_may_have_been_meant_otherwise(path: str, remedy: str) -> None:
    with pytest.raises(NoInputError, match=remedy):
        open_checkpoint(Path(path))


@pytest.mark.parametrize(
    ("inside", "remedy"),
    [
        (".metadata", "dcp_to_torch"),
        ("__0_0.distcp", "dcp_to_torch"),
        ("adapter_config.json", r"merge_and_unload\(\)"),
    ],
)
def test_an_unreadable_folder_is_told_by_what_it_is(inside: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / inside).write_bytes(b"{}")
    with pytest.raises(NoInputError, match=remedy):
        open_checkpoint(tmp_path)


def test_compressed_members_are_refused_and_not_taken_for_numbers(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(4096.0)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "again.pth", "w", zipfile.ZIP_DEFLATED) as again,
    ):
        for name in plain.namelist():
            again.writestr(name, plain.read(name))
    with pytest.raises(BadInputError, match=r"its members are compressed, which torch\.save never does; save it again"):
        open_checkpoint(tmp_path / "again.pth")


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    torch.save({"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}}, tmp_path / "two.pth")
    with pytest.raises(BadInputError, match=r"it holds two tensors that are named a\.b"):
        open_checkpoint(tmp_path / "two.pth")
    torch.save({"w": torch.ones(2), "shadow": [torch.ones(1), (torch.zeros(3),)]}, tmp_path / "list.pth")
    assert list(open_checkpoint(tmp_path / "list.pth").infos) == ["w", "shadow.0", "shadow.1.0"]


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.empty(3, device="meta"), "w is a meta tensor"),
        (torch.eye(3).to_sparse(), "w is a sparse tensor"),
        (torch.zeros(1).expand(20_000, 20_000), r"w has 1\.6 GB by its shape, and 4 bytes are stored"),
    ],
)
def test_tensors_without_numbers_of_their_own_are_refused_by_name(tensor: Tensor, why: str, tmp_path: Path) -> None:
    torch.save({"w": tensor}, tmp_path / "odd.pth")
    with pytest.raises(BadInputError, match=why):
        open_checkpoint(tmp_path / "odd.pth")


def test_archives_and_pointers_of_others_are_told_by_their_kind(tmp_path: Path) -> None:
    np.savez(tmp_path / "vit.npz", w=np.ones(3))
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    told = {"vit.npz": "NumPy", "script.pt": r"TorchScript program; .*state_dict", "lfs.safetensors": "git lfs pull"}
    for name, words in told.items():
        with pytest.raises(BadInputError, match=words):
            open_checkpoint(tmp_path / name)


def test_a_part_of_a_distributed_checkpoint_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"anything at all")
    with pytest.raises(BadInputError, match=r"it is a distributed checkpoint of torch; .*dcp_to_torch"):
        open_checkpoint(tmp_path / "__0_0.distcp")


@pytest.mark.parametrize("failure", [PermissionError("not yours"), MemoryError("no more")])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_machine_failure_is_not_blamed_on_the_file(
    name: str, failure: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    (tmp_path / name).write_bytes(b"PK")
    monkeypatch.setattr("safetensors.safe_open", fail)
    monkeypatch.setattr("torch.load", fail)
    monkeypatch.setattr(sources, "SMALL", 1)  # bytes: of a small file the sizes that it claims are to blame
    with pytest.raises(type(failure), match=str(failure)):
        open_checkpoint(tmp_path / name)
