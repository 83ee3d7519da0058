"""The safetensors writer, judged by the library's reader."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sinder_cli import BadInputError, TensorInfo
from sinder_cli.backbone.sources import infos_of
from sinder_cli.backbone.storing import stored_as, write_safetensors

MIXED: dict[str, Tensor] = {
    "z.last": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "a.half": torch.tensor([1.5, -2.25], dtype=torch.float16),
    "m.brain": torch.tensor([[0.1, 1e30]], dtype=torch.bfloat16),
    "scalar": torch.tensor(math.pi, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False, True]),
    "counts": torch.tensor([-1, 2**40]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "not a number": torch.tensor([math.nan, math.inf]),
    "ключ \"ν\"": torch.ones(1),
}  # fmt: skip


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    write_safetensors(path, infos_of(tensors), tensors.values(), metadata)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_library_reads_back_every_dtype_and_shape_exactly(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", MIXED)
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(MIXED)
    for name, tensor in MIXED.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor)


def test_names_keep_the_order_in_which_they_were_given(tmp_path: Path) -> None:
    names = {name: MIXED[name] for name in MIXED if name != "empty"}  # two tensors may share an empty one's offset
    write(tmp_path / "a.safetensors", names)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert list(file.offset_keys()) == list(names)


def test_metadata_is_kept_and_absent_without_any(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", MIXED, {"format": "ν-1"})
    write(tmp_path / "b.safetensors", MIXED)
    for name, metadata in (("a", {"format": "ν-1"}), ("b", None)):
        with safe_open(tmp_path / f"{name}.safetensors", framework="pt") as file:
            assert file.metadata() == metadata


def test_the_data_begin_at_a_multiple_of_eight_bytes(tmp_path: Path) -> None:
    for length in range(1, 10):
        write(tmp_path / "a.safetensors", {"n" * length: torch.ones(1)})
        header = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
        assert header % 8 == 0


def test_a_tensor_in_any_layout_is_written_in_logical_order(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {"transposed": base.T, "strided": base[::2, 1::2], "expanded": torch.ones(1, 3).expand(2, 3)}
    write(tmp_path / "a.safetensors", views)
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], view) for name, view in views.items())


def test_one_tensor_is_taken_at_a_time(tmp_path: Path) -> None:
    taken: list[weakref.ref[Tensor]] = []

    def tensors() -> Iterator[Tensor]:
        for _ in range(5):
            assert sum(known() is not None for known in taken) <= 1  # the one that was just written
            tensor = torch.ones(3)
            taken.append(weakref.ref(tensor))
            yield tensor

    infos = {f"t{index}": TensorInfo((3,), torch.float32) for index in range(5)}
    write_safetensors(tmp_path / "a.safetensors", infos, tensors())
    assert len(taken) == 5


@pytest.mark.parametrize("count", [len(MIXED) - 1, len(MIXED) + 1], ids=["too few", "too many"])
def test_another_number_of_tensors_than_announced_is_an_error(count: int, tmp_path: Path) -> None:
    tensors = [*MIXED.values(), torch.ones(1)][:count]
    with pytest.raises(ValueError, match=r"zip\(\)"):
        write_safetensors(tmp_path / "a.safetensors", infos_of(MIXED), tensors)
    assert list(tmp_path.iterdir()) == []


def broken(name: str) -> Tensor:
    if name == "m.brain":
        raise RuntimeError("the third tensor cannot be read")
    return MIXED[name]


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (broken, "the third tensor cannot be read"),
        (lambda name: MIXED[name].flatten(), "announced as"),
        (lambda name: MIXED[name].float(), "announced as"),
    ],
    ids=["a failing read", "another shape", "another dtype"],
)
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "over an old file"])
def test_a_write_that_fails_leaves_no_file(
    read: Callable[[str], Tensor], told: str, replaces: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    if replaces:
        path.write_bytes(b"old")
    with pytest.raises((RuntimeError, AssertionError), match=told):
        write_safetensors(path, infos_of(MIXED), (read(name) for name in MIXED))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([b"old"] if replaces else [])


def test_a_dtype_without_a_code_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"cannot store phase .* no code for torch\.complex64"):
        write(tmp_path / "a.safetensors", {"phase": torch.zeros(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


def test_a_value_too_large_for_half_precision_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"cannot store blocks\.3\.w: .* torch\.float16") as caught:
        stored_as(torch.tensor([1.0, 70_000.0]), "blocks.3.w", torch.float16)
    assert caught.value.exit_code == 65


def test_a_value_that_fits_is_rounded_to_the_file_dtype() -> None:
    values = torch.tensor([1.0001, -65_504.0])
    assert stored_as(values, "w", torch.float16).tolist() == [1.0, -65_504.0]
    assert stored_as(torch.tensor([70_000.0]), "w", torch.bfloat16).dtype == torch.bfloat16


def test_infos_are_shapes_and_dtypes() -> None:
    assert infos_of({"w": torch.zeros(2, 0, dtype=torch.int8)}) == {"w": TensorInfo((2, 0), torch.int8)}
