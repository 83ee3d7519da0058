"""Checkpoints are read lazily, strictly, and never unpickled freely."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sinder_cli import BadInputError, MemoryTensors, NoInputError, Weights
from sinder_cli.backbone import checkpoint
from sinder_cli.backbone.checkpoint import TensorInfo, open_checkpoint

ANCHOR = "patch_embed.weight"


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


def weights_of(*names: str) -> Weights:
    tensors = {name: torch.full((2,), float(index)) for index, name in enumerate(names)}
    return Weights.of(MemoryTensors("memory", tensors))


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


def test_nested_dictionaries_are_flattened_and_what_is_no_tensor_is_left_out(tmp_path: Path) -> None:
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
    with pytest.raises(NoInputError, match="it is a folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "a.h5").write_bytes(b"x")
    with pytest.raises(BadInputError, match=r"unknown suffix '\.h5'"):
        open_checkpoint(tmp_path / "a.h5")


def test_a_backbone_is_located_under_its_prefix() -> None:
    weights = weights_of("model.net." + ANCHOR, "model.net.norm", "head.weight").located(ANCHOR)
    assert (weights.names, weights.prefix, weights.ignored) == ([ANCHOR, "norm"], "model.net.", ("head.weight",))
    assert weights.read(["norm"])["norm"].tolist() == [1.0, 1.0]
    assert weights.output_name("norm") == "norm"


def test_a_backbone_without_a_prefix_is_located_as_it_is() -> None:
    weights = weights_of(ANCHOR, "norm").located(ANCHOR)
    assert (weights.names, weights.prefix, weights.ignored) == ([ANCHOR, "norm"], "", ())


@pytest.mark.parametrize(
    ("other", "meant"),
    [("student.backbone.", "teacher.backbone."), ("model.", "model_ema."), ("", "teacher."), ("schema.", "ema.")],
)
def test_the_teacher_is_preferred_to_the_student(other: str, meant: str) -> None:
    for order in ((other, meant), (meant, other)):
        weights = weights_of(*(prefix + name for prefix in order for name in (ANCHOR, "norm")))
        assert weights.located(ANCHOR).prefix == meant


@pytest.mark.parametrize("prefixes", [("left.", "right."), ("teacher.a.", "teacher.b.")])
def test_several_backbones_none_of_which_is_meant_are_refused(prefixes: tuple[str, str]) -> None:
    with pytest.raises(BadInputError, match=f"several backbones: {prefixes[0]}, {prefixes[1]}"):
        weights_of(*(prefix + ANCHOR for prefix in prefixes)).located(ANCHOR)


def test_a_checkpoint_of_something_else_is_refused() -> None:
    with pytest.raises(BadInputError, match="none of its 2 tensors is"):
        weights_of("not" + ANCHOR, "norm").located(ANCHOR)  # the name ends alike, but not after a dot


def test_renamed_tensors_are_read_and_exported_under_the_right_names() -> None:
    weights = weights_of("model." + ANCHOR, "model.old.w").located(ANCHOR).renamed(lambda n: n.replace("old", "new"))
    assert weights.names == [ANCHOR, "new.w"]
    assert weights.read(["new.w"])["new.w"].tolist() == [1.0, 1.0]
    assert weights.output_name("new.w") == "old.w"
    assert "old.w" not in weights


def test_two_tensors_that_become_one_are_refused() -> None:
    with pytest.raises(BadInputError, match=r"a\.x and b\.x both mean x"):
        weights_of("a.x", "b.x").renamed(lambda name: name[2:])


def fingerprint(tensors: dict[str, Tensor]) -> str:
    return Weights.of(MemoryTensors("memory", tensors)).fingerprint()


def test_a_fingerprint_changes_with_one_bit() -> None:
    changed = drawn()
    changed["z.weight"].view(torch.int32)[3, 2] ^= 1
    assert fingerprint(changed) != fingerprint(drawn())


def test_a_fingerprint_changes_with_names_shapes_and_dtypes() -> None:
    variants = [
        {"w": torch.zeros(4)},
        {"v": torch.zeros(4)},
        {"w": torch.zeros(2, 2)},
        {"w": torch.zeros(4, dtype=torch.int32)},
        {"w": torch.zeros(4), "v": torch.zeros(0)},
    ]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)


def test_a_fingerprint_does_not_depend_on_the_file_or_the_order(tmp_path: Path) -> None:
    save_file(drawn(), tmp_path / "a.safetensors")
    torch.save(dict(reversed(drawn().items())), tmp_path / "a.pth")
    found = {Weights.of(open_checkpoint(tmp_path / name)).fingerprint() for name in ("a.safetensors", "a.pth")}
    assert found == {fingerprint(drawn())}


class Recording:
    """A source that notes what is asked of it at a time."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.inner = MemoryTensors("memory", tensors)
        self.label, self.infos = "memory", self.inner.infos
        self.asked: list[list[str]] = []

    def read(self, names: Any) -> dict[str, Tensor]:
        self.asked.append(list(names))
        return self.inner.read(self.asked[-1])


def test_a_stream_holds_no_more_than_a_batch_and_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "BATCH_BYTES", 100)
    source = Recording({f"w{i}": torch.full((10,), float(i)) for i in range(7)})  # 40 bytes each
    order = ["w3", "w0", "w6", "w1", "w2", "w5", "w4"]
    streamed = list(Weights.of(source).stream(order))
    assert [name for name, _ in streamed] == order
    assert all(tensor[0].item() == int(name[1]) for name, tensor in streamed)
    assert source.asked == [order[:3], order[3:6], order[6:]]


def test_nothing_is_read_until_it_is_asked_for() -> None:
    source = Recording(drawn())
    weights = Weights.of(source).renamed(str.upper)
    assert weights.shape("Z.WEIGHT") == (4, 3)
    assert source.asked == []
    weights.read(["A.BIAS"])
    assert source.asked == [["a.bias"]]
