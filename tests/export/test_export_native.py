"""`--to native`: official keys, order and dtype, bit for bit; in other dtypes where the values fit."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sinder_cli.backbone.sources import infos_of
from sinder_cli.errors import BadInputError, UsageError
from sinder_cli.exporting import native
from sinder_cli.exporting.drafts import ExportResult
from sinder_cli.exporting.native import write_torch_file

Export = Callable[..., ExportResult]
CUSTOM = "dinov2_custom"
EVERY_DTYPE = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def loaded(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, weights_only=True)
    return state


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_what_is_loaded_is_what_was_there(export: Export, plain: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out{suffix}"
    result = export(CUSTOM, "native", out, plain)
    original, found = load_file(plain), loaded(out)
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], original[name]) for name in original)
    assert result.check.verified
    assert result.check.difference == 0
    assert (result.bytes, [file.name for file in result.files]) == (out.stat().st_size, [out.name])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_another_dtype_is_that_of_every_tensor(
    export: Export, plain: Path, tmp_path: Path, suffix: str, dtype: str
) -> None:
    out = tmp_path / f"out{suffix}"
    export(CUSTOM, "native", out, plain, dtype=dtype)
    kind = getattr(torch, dtype)
    assert all(torch.equal(tensor, load_file(plain)[name].to(kind)) for name, tensor in loaded(out).items())
    assert {tensor.dtype for tensor in loaded(out).values()} == {kind}


def test_a_value_that_does_not_fit_is_an_error(export: Export, plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain)
    tensors["blocks.1.mlp.fc2.bias"][3] = 1e5
    save_file(tensors, tmp_path / "large.safetensors")
    with pytest.raises(BadInputError, match=r"cannot store blocks\.1\.mlp\.fc2\.bias: .* torch\.float16"):
        export(CUSTOM, "native", tmp_path / "out.pth", tmp_path / "large.safetensors", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["large.safetensors"]
    export(CUSTOM, "native", tmp_path / "out.pth", tmp_path / "large.safetensors", dtype="bfloat16")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_that_reads_back_differently_leaves_nothing(
    export: Export, plain: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = native.write_weights

    def flipped(path: Path, weights: object) -> None:
        genuine(path, weights)  # type: ignore[arg-type]
        content = bytearray(path.read_bytes())
        at = content.rindex(bytes(bits(load_file(plain)["blocks.1.norm1.weight"])[:64].tolist()))
        content[at + 2] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(native, "write_weights", flipped)
    with pytest.raises(BadInputError, match=r"blocks\.1\.norm1\.weight differs when it is read back"):
        export(CUSTOM, "native", tmp_path / f"out{suffix}", plain)
    assert list(tmp_path.iterdir()) == []


def test_without_a_check_the_result_says_so(
    export: Export, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "read_back", lambda *_: pytest.fail("it was checked"))
    result = export(CUSTOM, "native", tmp_path / "out.pth", plain, verify=False)
    assert not result.check.verified
    assert result.check.line == "not checked: --no-verify"


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"image_size": 84}, "--image-size"),
        ({"max_shard_size": 1}, "--max-shard-size"),
        ({"dynamic_size": True}, "--dy"),
    ],
)
def test_an_option_without_effect_is_refused(
    export: Export, plain: Path, tmp_path: Path, options: dict[str, object], option: str
) -> None:
    with pytest.raises(UsageError, match=f"cannot use {option}"):
        export(CUSTOM, "native", tmp_path / "out.pth", plain, **options)


# Torch files, written one tensor at a time


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_tensors_of_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, mapped: bool) -> None:
    path = tmp_path / "model.pth"
    drawn = torch.randn(24, generator=torch.Generator().manual_seed(0)) * 3
    tensors = {"a": drawn.view(2, 3, 4).to(dtype), "deep.b": drawn[5].to(dtype), "none": drawn[:0].view(0, 4).to(dtype)}
    write_torch_file(path, infos_of(tensors), tensors.values())
    found = torch.load(path, weights_only=True, mmap=mapped)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(found[name]), bits(tensor))


def test_the_same_tensors_make_the_same_file_of_aligned_members(tmp_path: Path) -> None:
    tensors = {f"tensor {number}": torch.randn(number * 7 + 1) for number in range(9)}
    for name in ("one.pth", "two.pth"):
        write_torch_file(tmp_path / name, infos_of(tensors), tensors.values())
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.pth").read_bytes()
    assert zipfile.ZipFile(tmp_path / "one.pth").testzip() is None
    mapped = torch.load(tmp_path / "one.pth", weights_only=True, mmap=True)
    assert {tensor.data_ptr() % 64 for tensor in mapped.values()} == {0}


def test_a_tensor_that_is_not_as_announced_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="announced as"):
        write_torch_file(tmp_path / "a.pth", infos_of({"a": torch.zeros(2)}), [torch.zeros(3)])


PEAK = """
import resource, sys
import torch
from pathlib import Path
from sinder_cli.backbone.sources import open_checkpoint
from sinder_cli.backbone.weights import Weights
from sinder_cli.exporting.native import read_back, write_weights
torch.load, torch.ones(9).clone()  # whatever loads late
source, out, small = map(Path, sys.argv[1:])
for path in (small, source):  # the small one has everything imported
    weights = Weights.of(open_checkpoint(path))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_weights(out, weights)
    read_back(out, weights)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_few_tensors_are_held_at_a_time(tmp_path: Path, suffix: str) -> None:
    save_file({f"tensor {number}": torch.ones(16 << 20) for number in range(12)}, tmp_path / "large.safetensors")
    save_file({"tensor": torch.ones(9)}, tmp_path / "small.safetensors")
    paths = [str(tmp_path / name) for name in ("large.safetensors", f"out{suffix}", "small.safetensors")]
    done = subprocess.run([sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) < 500  # MB, of 768: twice two tensors, of the file and of its copy
