"""A backbone's tensors are found in what holds them, renamed, streamed and fingerprinted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sinder_cli import BadInputError, MemoryTensors, TensorInfo, WeightRef, Weights, require_matching
from sinder_cli.backbone import weights as module
from sinder_cli.backbone.sources import open_checkpoint

ANCHOR = "patch_embed.weight"


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
    first, second = (prefix.rstrip(".") for prefix in prefixes)
    with pytest.raises(BadInputError, match=f"several backbones: {first}, {second}; choose with --branch"):
        weights_of(*(prefix + ANCHOR for prefix in prefixes)).located(ANCHOR)


def branches(branch: str | None = None) -> Weights:
    """A converted distributed checkpoint."""
    names = ("student", "teacher", "model_ema", "gram_teacher")
    tensors = {f"model.{name}.backbone.{ANCHOR}": torch.full((2,), float(i)) for i, name in enumerate(names)}
    return Weights.of(MemoryTensors("memory", tensors), branch)


def test_the_teacher_is_taken_among_many_branches() -> None:
    found = branches().located(ANCHOR)
    assert found.prefix == "model.teacher.backbone."
    assert found.others == ("model.student.backbone.", "model.model_ema.backbone.", "model.gram_teacher.backbone.")
    assert found.read([ANCHOR])[ANCHOR].tolist() == [1, 1]


@pytest.mark.parametrize(("branch", "value"), [("student", 0), ("gram_teacher", 3), ("model.model_ema.backbone", 2)])
def test_a_branch_is_taken_by_any_part_of_its_prefix(branch: str, value: int) -> None:
    assert branches(branch).located(ANCHOR).read([ANCHOR])[ANCHOR].tolist() == [value, value]


def test_a_missing_branch_is_refused_with_the_existing_ones() -> None:
    with pytest.raises(BadInputError, match=r"its backbones are model\.student\.backbone, .*; name one of these"):
        branches("pupil").located(ANCHOR)


@pytest.mark.parametrize(("prefix", "place"), [("", "without a prefix"), ("model.visual.", r"under model\.visual")])
def test_a_branch_of_a_file_of_one_backbone_is_refused(prefix: str, place: str) -> None:
    weights = replace(weights_of(prefix + ANCHOR, "other"), branch="teacher")
    with pytest.raises(BadInputError, match=rf"it holds one backbone, {place}; leave --branch out"):
        weights.located(ANCHOR)


def test_wrappers_are_seen_through_anywhere_and_exported_under_plain_names() -> None:
    stored = ("_orig_mod.blocks.0._checkpoint_wrapped_module.w", "_orig_mod._fsdp_wrapped_module." + ANCHOR)
    found = weights_of(*stored).located(ANCHOR)
    assert found.names == ["blocks.0.w", ANCHOR]
    assert [found.output_name(name) for name in found.names] == found.names
    assert found.read(["blocks.0.w"])["blocks.0.w"].tolist() == [0, 0]
    with pytest.raises(BadInputError, match=r"a and _orig_mod\.a both mean a"):
        weights_of("a", "_orig_mod.a")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("base_model.model.blocks.0.attn.q.lora_A.default.weight",), r"LoRA of peft; .*merge_and_unload"),
        (("blocks.0.attn.q.lora_B.weight",), r"LoRA of peft; .*merge_and_unload"),
        (("blocks.0._flat_param", "_flat_param"), r"flat parameters of FSDP.*teacher_checkpoint\.pth"),
    ],
)
def test_what_cannot_be_read_safely_is_told_by_its_kind(names: tuple[str, ...], told: str) -> None:
    with pytest.raises(BadInputError, match=told):
        weights_of(*names).located(ANCHOR)
    with pytest.raises(BadInputError, match=rf"do not fit a model: .*{told}"):
        require_matching({"w": (2,)}, weights_of("w", *names), "a model")


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


def test_a_fingerprint_does_not_depend_on_file_or_order(tmp_path: Path) -> None:
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


def test_a_stream_holds_one_batch_and_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 100)
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


def test_mapped_weights_change_tensors_as_they_are_read() -> None:
    stored = {"model.a": torch.arange(6.0).view(3, 2), "model.b": torch.ones(2), "model.n": torch.tensor([3])}
    weights = Weights.of(MemoryTensors("memory", stored)).renamed(lambda name: name.removeprefix("model."))
    read: list[str] = []

    def halved(tensor: Tensor) -> Tensor:
        read.append("a")
        return (tensor / 2).half()

    mapped = weights.mapped("halved", {"a": halved}, {"a": torch.float16})
    assert read == []  # nothing before it is asked for
    assert mapped.source.label == "halved"
    assert mapped.names == weights.names
    assert [mapped.info(name) for name in "bn"] == [weights.info(name) for name in "bn"]
    assert mapped.info("a") == TensorInfo((3, 2), torch.float16)
    found = mapped.read(["n", "a"])
    assert list(found) == ["n", "a"]
    assert torch.equal(found["a"], (stored["model.a"] / 2).half())
    assert torch.equal(found["n"], stored["model.n"])
    assert read == ["a"]
    assert torch.equal(stored["model.a"], torch.arange(6.0).view(3, 2))


def test_the_shape_of_a_reference_is_that_of_its_rows() -> None:
    weights = Weights.of(MemoryTensors("memory", {"w": torch.zeros(6, 2, 3)}))
    assert weights.shape_of(WeightRef(name="w")) == (6, 2, 3)
    assert weights.shape_of(WeightRef(name="w", rows=(2, 5))) == (3, 2, 3)
