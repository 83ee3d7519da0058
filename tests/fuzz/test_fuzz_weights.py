"""Damaged weights: safetensors headers, `.pth` archives, indexes of shards, and pickles with a payload."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_harness import EXTREMES, VALUES, Case, damaged, mutated, require_ours
from safetensors.torch import save_file
from torch import Tensor

from sinder_cli import ModelRequest, api
from sinder_cli.requests import PredictRequest

BYTES = 150  # random cases a round


def opened(path: Path, content: bytes | None = None) -> Callable[[], object]:
    """What a case does: write the file, and predict from it, which reads names, shapes and tensors."""

    def run() -> object:
        if content is not None:
            path.write_bytes(content)
        return api.predict_defects(PredictRequest(ModelRequest("dinov2_custom", path), ["block"]))

    return run


def with_header(content: bytes, header: bytes, length: int | None = None) -> bytes:
    """A safetensors file with another header, and another length announced than it has."""
    size = int.from_bytes(content[:8], "little")
    announced = len(header) if length is None else length
    return announced.to_bytes(8, "little") + header + content[8 + size :]


def test_a_safetensors_header_with_other_fields(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = "blocks.0.mlp.fc1.weight"
    begin, end = header[name]["data_offsets"]
    values = VALUES | {
        "past the end": [begin, 10**12],
        "backwards": [end, begin],
        "of another": [0, end - begin],
        "short": [begin, end - 4],
        "negative offsets": [-8, end],
        "wide": [2**32, 2**32],
        "of many axes": [1] * 100_000,
        "half": "F16",
        "double": "F64",
        "bytes": "U8",
        "eighth": "F8_E4M3",
        "unknown": "Q4",
    }
    cases = []
    for place in [(name,), *((name, part) for part in ("dtype", "shape", "data_offsets"))]:
        for told, value in values.items():
            text = json.dumps(mutated(header, place, value)).encode()
            cases.append(
                Case(f"{'.'.join(place)}: {told}", opened(tmp_path / "a.safetensors", with_header(content, text)))
            )
    for length in EXTREMES:
        cases.append(  # noqa: PERF401
            Case(
                f"length {length}",
                opened(tmp_path / "a.safetensors", with_header(content, content[8 : 8 + size], length)),
            )
        )
    for told, text in (
        ("no JSON", b"{" * 10_000),
        ("deep", b"[" * 100_000 + b"]" * 100_000),
        ("no UTF-8", b"\xff" * 64),
        ("a list", b"[]"),
    ):
        cases.append(Case(told, opened(tmp_path / "a.safetensors", with_header(content, text))))
    require_ours(cases, least_refused=0.9)


def test_a_safetensors_file_with_other_bytes(whole: Path, tmp_path: Path, rounds: range) -> None:
    content = whole.read_bytes()
    size = int.from_bytes(content[:8], "little")
    cases = []
    for number in rounds:
        for index in range(BYTES):
            draw = random.Random(f"safetensors {number} {index}")
            cases.append(
                Case(f"round {number}, {index}", opened(tmp_path / "a.safetensors", damaged(content, draw, 8 + size)))
            )
    require_ours(cases, least_refused=0.5)


def archive_of(tensors: dict[str, Tensor], old: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
def test_a_torch_file_with_other_bytes(old: bool, tensors: dict[str, Tensor], tmp_path: Path, rounds: range) -> None:
    content = archive_of(tensors, old)
    cases = []
    for number in rounds:
        for index in range(BYTES):
            draw = random.Random(f"torch {old} {number} {index}")
            within = draw.choice((200, 20_000, len(content)))
            data = damaged(content, draw, within)
            if draw.random() < 0.3:  # the directory of a zip archive lies at its end
                data = damaged(content[::-1], draw, 4000)[::-1]
            cases.append(Case(f"round {number}, {index}", opened(tmp_path / "a.pth", data)))
    require_ours(cases, least_refused=0.2)


def test_a_torch_archive_with_other_members(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    content = archive_of(tensors)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    first = next(name for name in members if name.endswith("data/0"))
    pickled = next(name for name in members if name.endswith("data.pkl"))
    root = pickled.removesuffix("data.pkl")
    ways: dict[str, dict[str, bytes]] = {
        "none": {},
        "only the pickle": {pickled: members[pickled]},
        "no first storage": {name: data for name, data in members.items() if name != first},
        "a short storage": members | {first: members[first][:8]},
        "a long storage": members | {first: members[first] * 3},
        "an empty pickle": members | {pickled: b""},
        "a cut pickle": members | {pickled: members[pickled][:-40]},
        "another byte order": members | {f"{root}byteorder": b"big"},
        "no byte order": members | {f"{root}byteorder": b"middle"},
        "another version": members | {f"{root}version": b"999\n"},
        "TorchScript": members | {f"{root}constants.pkl": members[pickled]},
        "a member that climbs out": members | {"../../evil": b"evil"},
        "two roots": members | {"other/data.pkl": members[pickled]},
    }
    cases = []
    for told, held in ways.items():
        for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w", compression) as archive:
                for name, data in held.items():
                    archive.writestr(name, data)
            cases.append(Case(f"{told}, {compression}", opened(tmp_path / "a.pth", file.getvalue())))
    require_ours(cases, least_refused=0.3)
    assert not (tmp_path.parent.parent / "evil").exists()


class Payload:
    """What a pickle can do to whoever trusts it."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def test_no_payload_of_a_pickle_runs(tensors: dict[str, Tensor], whole: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    payloads = {
        "os.system": Payload(os.system, f"touch {mark}"),
        "eval": Payload(eval, f"open({str(mark)!r}, 'w').close()"),
        "exec": Payload(exec, f"open({str(mark)!r}, 'w').close()"),
        "a file": Payload(open, str(mark), "w"),
        "mkdir": Payload(os.mkdir, str(mark)),
        "an allocation": Payload(bytearray, 1 << 40),
        "a large tensor": Payload(torch.zeros, 1 << 40),
        "torch.load": Payload(torch.load, str(whole)),
    }
    cases = []
    for told, payload in payloads.items():
        stored = {"model": tensors, "args": payload}
        for old in (False, True):
            for protocol in (2, 4):
                file = io.BytesIO()
                torch.save(stored, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not old)
                name = f"{told}, {'old' if old else 'zip'}, protocol {protocol}"
                cases += [
                    Case(f"{name}, {suffix}", opened(tmp_path / f"a.{suffix}", file.getvalue()))
                    for suffix in ("pth", "pt", "bin")
                ]
        cases.append(Case(f"{told}, bare", opened(tmp_path / "a.pth", pickle.dumps(stored))))
    require_ours(cases, least_refused=1.0)
    assert not mark.exists()


def test_an_index_of_shards_with_other_fields_and_paths(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    save_file(tensors, folder / "a.safetensors")
    save_file(tensors, outside / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(outside / "secret.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "inner.safetensors").mkdir()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "a.safetensors")}
    name = next(iter(tensors))
    climbing = [
        "../outside/secret.safetensors", str(outside / "secret.safetensors"), "./../outside/secret.safetensors",
        "a/../../outside/secret.safetensors", "link.safetensors", "loop.safetensors", "inner.safetensors", "..", "",
        "a.safetensors\0", "\x1b.safetensors", "a" * 5000 + ".safetensors", "/dev/zero", "/dev/zero.safetensors",
        "//outside.safetensors", "~/a.safetensors", "missing.safetensors", "\udcff.safetensors", "C:\\a.safetensors",
    ]  # fmt: skip
    changed = {f"a shard {shard[:40]!r}": mutated(index, ("weight_map", name), shard) for shard in climbing}
    changed |= {
        f"all shards {shard[:40]!r}": index | {"weight_map": dict.fromkeys(tensors, shard)} for shard in climbing
    }
    for place in (("weight_map",), ("weight_map", name), ("metadata",), ("metadata", "total_size")):
        changed |= {f"{place[-1]}: {told}": mutated(index, place, value) for told, value in VALUES.items()}
    path = folder / "model.safetensors.index.json"
    cases = [
        Case(told, opened(path, json.dumps(document).encode("utf-8", "surrogatepass")))
        for told, document in changed.items()
    ]
    for told, text in (
        ("no JSON", b"{"),
        ("deep", b"[" * 100_000),
        ("digits", b"9" * 5000),
        ("a list", b"[]"),
        ("nothing", b""),
        ("no UTF-8", b"\xff"),
    ):
        cases.append(Case(told, opened(path, text)))
    counts = require_ours(cases, least_refused=0.6)
    assert counts["taken"] == len(VALUES) * 2, "only what metadata says does not matter"
