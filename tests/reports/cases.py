"""What users bring, case by case: builds each input, runs `sinder` on it, and writes CASES.md.

    python tests/reports/cases.py                      all cases, by the program that is installed
    python tests/reports/cases.py --cases "LoRA|8×32"  those whose names match
    python tests/reports/cases.py --before PATH        also by an earlier version, a checkout at PATH

Each case is a process of its own in a fresh folder, one thread, 6 GB of address space and 30 s. The script exits with 1
if a case does not end as it is expected to now. What an earlier run has found of other cases is kept in CASES.md.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parent / "CASES.md"
TESTS = Path(__file__).parents[1]
PATIENCE, SLOW = 30.0, 10.0  # seconds: a case is stopped after the first; the table says of one that takes the second
HOSTILE = 7  # the section whose cases may not be slow
MOST_BYTES = 6 << 30  # of address space
MOST_CHARACTERS = 160  # of a line in the table
ENDING = 60  # of them, where the line is longer: the end says what to do
WANTED, UNWANTED = "✓", "✗"
SECTIONS = {
    1: "The newest libraries, and children that die",
    2: "Nothing dropped or resampled in silence",
    3: "Containers and prefixes",
    4: "Photographs",
    5: "Lists and names",
    6: "Messages",
    7: "Hostile files",
    8: "Children and signals",
}
INHERITED = ("PATH", "LANG", "LC_ALL")  # of the environment; all else would differ from machine to machine
CUSTOM = "dinov2_custom"
TINY = ("--weights", "tiny.safetensors")
LOOK = ("analyze", CUSTOM, *TINY, "--workers", "0", "--data")
STEP = ("--max-steps", "1", "--eval-images", "1", "--workers", "0")
PROGRESS = r"sinder: \w+: \d+/\d+ "  # lines that a slow run prints
IMAGES = r'^  "images": '  # of the JSON document of `analyze`
EXECUTED = "executed"  # a file that is there once a checkpoint's code has run
BLOCK_OR_NORM = r"^(blocks\.\d+|norm)\."  # in names of tensors
Tensors = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A command: the arguments of `sinder`, and what its process is given."""

    arguments: Sequence[str | Path]
    stdin: bytes = b""
    modules: Mapping[str, str] = field(default_factory=dict)  # of Python, found before those that are installed
    shown: str = ""  # a file that the command writes, looked at beside what it prints
    signals: tuple[signal.Signals, ...] = ()  # sent after the first step; SIGINT and SIGHUP are ignored from the start
    most_file_bytes: int = -1
    stdout: str = ""  # a file or device
    program: tuple[str, ...] = ("-m", "sinder_cli")
    patience: float = PATIENCE
    first: Sequence[str | Path] = ()  # a command that is run before it and not looked at
    then: Callable[[], object] = lambda: None  # what is done after that


@dataclass(frozen=True)
class Case:
    """One input and how its run must end now; `line` is a regular expression, `seen` one for which line to show."""

    section: int
    name: str
    code: int  # exit code, or minus a signal
    line: str
    build: Callable[[Path], Call]
    seen: str = ""


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code or minus a signal (None: it was stopped), and all lines, standard error first."""

    code: int | None
    seconds: float
    has_executed: bool  # code that an input holds
    errors: list[str]
    lines: list[str]

    def shown(self, case: Case) -> str:
        """The line that tells most: the last that is expected, or to be shown; else the last of standard error."""
        for pattern in filter(None, (case.line, case.seen)):
            if found := [line for line in self.lines if re.search(pattern, line)]:
                return found[-1]
        told = [line for line in self.errors if not re.match(PROGRESS, line)]
        return (told or self.lines or [""])[-1]

    def is_as_expected(self, case: Case) -> bool:
        told = any(re.search(case.line, line) for line in self.lines)
        in_time = case.section != HOSTILE or self.seconds <= SLOW
        return self.code == case.code and told and in_time and not self.has_executed

    def __str__(self) -> str:
        if self.code is None:
            return f"more than {self.seconds:.0f} s"
        words = f"exit {self.code}" if self.code >= 0 else f"signal {-self.code}"
        words += f" after {self.seconds:.0f} s" if self.seconds > SLOW else ""
        return f"{words}, and code of the file has run" if self.has_executed else words


# Tensors


def random_tensors(shapes: Mapping[str, tuple[int, ...]], scale: float = 0.05) -> Tensors:
    import torch

    torch.manual_seed(0)
    return {name: torch.randn(shape) * scale for name, shape in shapes.items()}


def dinov2(**sizes: Any) -> Tensors:
    """A DINOv2 of two blocks of width 64 under the official names."""
    from sinder_plugins.dinov2.config import Config, tensor_shapes

    return random_tensors(tensor_shapes(Config(**{"width": 64, "depth": 2, "hidden": 128, "grid": 5} | sizes)))


def official(name: str) -> Tensors:
    """Random tensors of an official model."""
    from sinder_plugins.dinov2.config import OFFICIAL, tensor_shapes

    return random_tensors(tensor_shapes(OFFICIAL[name]))


def timm_tensors(name: str, **options: Any) -> Tensors:
    """Random tensors of a model of timm's by its own names."""
    from sinder_cli import define_torchvision_operators

    define_torchvision_operators()
    import timm
    import torch

    with torch.device("meta"):
        module = timm.create_model(name, **({"num_classes": 0} | options))
    return random_tensors({key: tuple(value.shape) for key, value in module.state_dict().items()})


def dinov3(biases: str = "") -> Tensors:
    """An official DINOv3 ViT-S/16: `biases` may be `zero`, `qv` (those of keys are zero), or `qkv`."""
    import torch

    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    pattern = re.compile("|".join(names))
    tensors = timm_tensors("vit_small_patch16_dinov3")
    found = {pattern.sub(lambda match: names[match[0]], name): value for name, value in tensors.items()}
    for block in range(12 if biases else 0):
        parts = [torch.full((384,), 0.1 if kind in biases and biases != "zero" else 0.0) for kind in "qkv"]
        found[f"blocks.{block}.attn.qkv.bias"] = torch.cat(parts)
    return found | {"mask_token": torch.zeros(1, 384), "rope_embed.periods": 100.0 ** (torch.arange(16) / 16)}


def openai_clip() -> Tensors:
    """The tower of a small CLIP by the names of OpenAI's code, and a tensor of its text."""
    import torch

    swaps = (
        (r"^patch_embed\.proj", "conv1"), (r"^pos_embed", "positional_embedding"), (r"^cls_token", "class_embedding"),
        (r"^norm_pre", "ln_pre"), (r"^norm\.", "ln_post."), (r"^blocks", "transformer.resblocks"),
        (r"norm(\d)", r"ln_\1"), (r"qkv\.", "in_proj_"), (r"attn\.proj", "attn.out_proj"), (r"fc1", "c_fc"),
        (r"fc2", "c_proj"), (r"^", "visual."),
    )  # fmt: skip
    found: Tensors = {"token_embedding.weight": torch.zeros(9, 32)}
    for name, tensor in timm_tensors("vit_xsmall_patch16_clip_224").items():
        for old, new in swaps:
            name = re.sub(old, new, name)
        found[name] = tensor[0] if "positional" in name else tensor[0, 0] if "class_" in name else tensor
    return found


def prefixed(*prefixes: str, tensors: Tensors | None = None) -> Tensors:
    """The same tensors under each of the prefixes."""
    return {prefix + name: tensor for prefix in prefixes for name, tensor in (tensors or dinov2()).items()}


def wrapped(pattern: str, replacement: str, tensors: Tensors | None = None) -> Tensors:
    """Tensors under names that are changed as a wrapper of torch changes them."""
    return {re.sub(pattern, replacement, name): tensor for name, tensor in (tensors or dinov2()).items()}


def with_head(name: str) -> Tensors:
    """A DINOv2 with a layer behind it."""
    return with_tensor(with_tensor(dinov2(), f"{name}.weight", 5, 64), f"{name}.bias", 5)


def split_swiglu() -> Tensors:
    """A DINOv2 whose MLPs have gate and up apart."""
    found: Tensors = {}
    for name, tensor in dinov2(hidden=176, mlp="SwiGLU").items():
        halves = tensor.chunk(2) if ".w12." in name else (tensor,)
        names = (name.replace("w12", "w1"), name.replace("w12", "w2")) if ".w12." in name else (name,)
        found |= {each: half.contiguous() for each, half in zip(names, halves, strict=True)}
    return found


def with_tensor(tensors: Tensors, name: str, *shape: int) -> Tensors:
    """The tensors and another one, of ones."""
    import torch

    return tensors | {name: torch.ones(shape)}


def without(tensors: Tensors, name: str) -> Tensors:
    return {other: tensor for other, tensor in tensors.items() if other != name}


def store(path: Path, tensors: Any) -> None:
    """Write a file of safetensors, or else as torch.save does."""
    import torch
    from safetensors.torch import save_file

    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def transformers_folder(folder: Path, sample: str = "ViT", **config: Any) -> Path:
    """A small model as `save_pretrained` writes it, with other entries in its `config.json`."""
    from sinder_cli import define_torchvision_operators

    define_torchvision_operators()
    sys.path.append(str(TESTS / "support"))
    from hf_samples import SAMPLES
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = SAMPLES[sample].made()
    model.save_pretrained(folder / "vit")
    change_json(folder / "vit" / "config.json", **config)
    return folder / "vit"


def change_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# Cases whose input is weights


def weighed(
    section: int,
    name: str,
    code: int,
    line: str,
    make: Callable[[], Any],
    model: str = CUSTOM,
    file: str = "weights.pth",
    options: Sequence[str] = (),
) -> Case:
    """A case of `predict-defects` with a file of weights."""

    def build(folder: Path) -> Call:
        store(folder / file, make())
        return Call(("predict-defects", model, "--weights", file, "--stage", "block", *options))

    return Case(section, name, code, line, build)


def folder_case(
    section: int, name: str, code: int, line: str, change: Callable[[Path], object], sample: str = "ViT"
) -> Case:
    """A case of `predict-defects` with a folder of transformers, changed."""

    def build(folder: Path) -> Call:
        change(transformers_folder(folder, sample))
        return Call(("predict-defects", "hf/./vit", "--stage", "block"))

    return Case(section, name, code, line, build)


def config_case(section: int, name: str, code: int, line: str, **entries: Any) -> Case:
    """The same with other entries in its `config.json`."""
    return folder_case(section, name, code, line, lambda vit: change_json(vit / "config.json", **entries))


def tensors_case(section: int, name: str, code: int, line: str, change: Callable[[Tensors], Tensors]) -> Case:
    """The same with other tensors."""

    def changed(vit: Path) -> None:
        from safetensors.torch import load_file

        store(vit / "model.safetensors", change(load_file(vit / "model.safetensors")))

    return folder_case(section, name, code, line, changed)


def line_case(section: int, name: str, code: int, line: str, command: str, **given: Any) -> Case:
    """A case that needs `tiny.safetensors`, `photos/` and `empty/` at most."""

    def build(folder: Path) -> Call:
        furnished(folder)
        return Call(shlex.split(command), **given)

    return Case(section, name, code, line, build)


def furnished(folder: Path, grid: int = 5) -> Path:
    """A tiny checkpoint, three photographs and an empty folder."""
    store(folder / "tiny.safetensors", dinov2(grid=grid))
    (folder / "empty").mkdir()
    return photographs(folder / "photos")


def photographs(folder: Path, count: int = 3, suffix: str = ".png", **options: Any) -> Path:
    folder.mkdir(parents=True)
    for at in range(count):
        picture(at).save(folder / f"{at}{suffix}", **options)
    return folder


def picture(seed: int = 0, width: int = 90, height: int = 80) -> Any:
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


# 1. The newest libraries, and children that die


ABORTING = "import os, sys\nprint('terminate called', file=sys.stderr, flush=True)\nos.abort()\n"
MISSING = "import sys\nsys.modules.update(dict.fromkeys({}))\n"  # as sitecustomize.py


def libraries() -> Iterator[Case]:
    tiny = "vit_tiny_patch16_224"
    yield weighed(
        1,
        "timm with a torchvision whose operators do not load, so that stand-ins are needed (one that brings its own, as"
        " the newest does, is seen by `make test-newest`)", 0, "matched 150 tensors", lambda: timm_tensors(tiny),
        f"timm/{tiny}",
    )  # fmt: skip
    for target, module in (("onnx", "onnxruntime"), ("transformers", "transformers")):

        def build(folder: Path, target: str = target, module: str = module) -> Call:
            furnished(folder)
            out = "out.onnx" if target == "onnx" else "out"
            return Call(("export", CUSTOM, *TINY, "--to", target, "--out", out), modules={module: ABORTING})

        yield Case(1, f"{module} aborts in the process that checks an export", 69, r"SIGABRT", build)


# 2. Nothing dropped or resampled in silence


def silent_changes() -> Iterator[Case]:
    yield from dropped_biases()
    yield from other_sizes()
    yield from tensors_too_many_and_too_few()


def dropped_biases() -> Iterator[Case]:
    plain, biased = "timm/vit_small_patch16_dinov3", "timm/vit_small_patch16_dinov3_qkvb"
    no_place = "no place for"
    told = f"{no_place} .*which are not zero; name the model {biased}"
    yield weighed(2, "official DINOv3, q/k/v biases not zero", 65, told, lambda: dinov3("qkv"), plain)
    yield weighed(2, "official DINOv3, q and v biases not zero", 65, told, lambda: dinov3("qv"), plain)
    yield weighed(2, "official DINOv3, biases all zero", 0, "matched 162 tensors", lambda: dinov3("zero"), plain)
    yield weighed(2, "official DINOv3 without biases", 0, "matched 162 tensors", dinov3, plain)
    yield weighed(
        2, "official DINOv3 with biases, by its right name", 0, r"matched \d+ tensors", lambda: dinov3("qv"), biased
    )
    yield weighed(
        2, "the same, and biases of keys that are not zero", 65, "384 of the 1152 numbers", lambda: dinov3("qkv"),
        biased,
    )  # fmt: skip

    def exported(folder: Path) -> Call:
        store(folder / "dinov3.pth", dinov3("qkv"))
        return Call(("export", plain, "--weights", "dinov3.pth", "--to", "native", "--out", "out.safetensors"))

    yield Case(2, "the first of these, exported", 65, told, exported)


def other_sizes() -> Iterator[Case]:
    small, tiny = "vit_small_patch16_224", "vit_tiny_patch16_224"
    yield weighed(
        2, "384-px fine-tune under the name for 224 px", 65,
        "pos_embed is 1×577×192.*name the model timm/vit_tiny_patch16_384",
        lambda: timm_tensors("vit_tiny_patch16_384"), f"timm/{tiny}",
    )  # fmt: skip
    yield weighed(
        2, "patch-8 file under a patch-16 name", 65, "name the model timm/vit_small_patch8_224",
        lambda: timm_tensors("vit_small_patch8_224"), f"timm/{small}",
    )  # fmt: skip
    yield weighed(
        2, "timm file of a 9×11 grid under a square name", 65, "pos_embed is 1×100×192",
        lambda: timm_tensors(tiny, img_size=(144, 176)), f"timm/{tiny}",
    )  # fmt: skip
    yield weighed(
        2, "official DINOv2 under timm's name, at another size", 65,
        "pos_embed is 1×257×384, and the model's is 1×1370×384",
        lambda: with_tensor(official("dinov2_vits14"), "pos_embed", 1, 257, 384), "timm/vit_small_patch14_dinov2",
    )  # fmt: skip
    yield weighed(
        2, "DINOv2 of 224 px under an official name of 518 px", 65, "grid 16 instead of 37",
        lambda: with_tensor(official("dinov2_vits14"), "pos_embed", 1, 257, 384), "dinov2_vits14",
    )  # fmt: skip
    yield weighed(
        2, "DINOv2 of a 4×6 grid", 65, "no square grid", lambda: with_tensor(dinov2(), "pos_embed", 1, 25, 64)
    )
    yield config_case(2, "8×32 grid (a config.json of 64×256 px, patches of 8)", 65, "no square", image_size=[64, 256])
    yield tensors_case(
        2, "transformers: 257 positions, and a config.json of 5×5 patches", 65, "mis-shaped",
        lambda tensors: with_tensor(tensors, "embeddings.position_embeddings", 1, 257, 32),
    )  # fmt: skip
    yield config_case(2, "transformers: config.json of another image size", 65, "1 mis-shaped", image_size=48)
    yield config_case(
        2, "transformers: config.json of another patch size", 65, "mis-shaped", patch_size=4, image_size=20
    )
    yield weighed(
        2, "DINOv2 with rows of positions for registers", 65, "no square grid: 29 patches",
        lambda: with_tensor(dinov2(), "pos_embed", 1, 30, 64),
    )  # fmt: skip


def tensors_too_many_and_too_few() -> Iterator[Case]:
    extra = "blocks.0.attn.extra"
    yield weighed(2, "dinov2: a tensor more", 65, f"1 unexpected: {extra}", lambda: with_tensor(dinov2(), extra, 2))
    yield weighed(2, "dinov2: a tensor less", 65, "1 missing: norm.bias", lambda: without(dinov2(), "norm.bias"))
    resized = "blocks.1.ls1.gamma"
    yield weighed(2, "dinov2: a tensor resized", 65, "1 mis-shaped", lambda: with_tensor(dinov2(), resized, 63))
    name = "vit_tiny_patch16_224"
    tensors = lambda: timm_tensors(name)  # noqa: E731
    yield weighed(
        2, "timm: a tensor more", 65, f"1 unexpected: {extra}", lambda: with_tensor(tensors(), extra, 2), f"timm/{name}"
    )
    yield weighed(
        2, "timm: a tensor less", 65, "1 missing: norm.bias", lambda: without(tensors(), "norm.bias"), f"timm/{name}"
    )
    yield weighed(
        2, "timm, by its own function: a tensor more that is not zero", 65, "no place for|unexpected",
        lambda: with_tensor(dinov3(), extra, 2), "timm/vit_small_patch16_dinov3",
    )  # fmt: skip
    in_layer = "encoder.layer.0.attention.output.dense"
    yield tensors_case(
        2, "hf: a tensor more", 65, "1 unexpected", lambda held: with_tensor(held, f"{in_layer}.more", 2)
    )
    yield tensors_case(2, "hf: a tensor less", 65, "1 missing", lambda held: without(held, f"{in_layer}.bias"))
    yield tensors_case(
        2, "hf: a tensor resized", 65, "1 mis-shaped", lambda held: with_tensor(held, f"{in_layer}.bias", 31)
    )


# 3. Containers and prefixes


def containers() -> Iterator[Case]:
    yield from nested_backbones()
    yield from wrapper_segments()
    yield from branches()
    yield from heads_and_suffixes()
    yield from what_to_do_instead()
    yield from other_architectures()
    yield from names_of_models()


def nested_backbones() -> Iterator[Case]:
    for prefix in ("teacher.backbone.", "model.", "state_dict.backbone.", "module.", "state_dict.module.encoder."):
        told = f"matched 35 tensors under '{prefix}'"
        yield weighed(3, f"tensors under `{prefix}`", 0, told, partial(prefixed, prefix))
    several = ("student", "teacher", "model_ema")
    yield weighed(
        3, "converted distributed checkpoint, `{model: {student.…, teacher.…, model_ema.…}}`", 0,
        r"matched 35 tensors under 'model\.teacher\.backbone\.', one of several",
        lambda: {"model": prefixed(*(f"{each}.backbone." for each in several))},
    )  # fmt: skip
    yield weighed(
        3, "`ssl_model.{student,teacher,model_ema,gram_teacher}`", 0,
        r"under 'ssl_model\.teacher\.backbone\.', one of several",
        lambda: prefixed(*(f"ssl_model.{each}.backbone." for each in (*several, "gram_teacher"))),
    )  # fmt: skip
    yield weighed(
        3, "DINOv3 of a student and a teacher, for timm", 0, r"matched 162 tensors.*one of several",
        lambda: prefixed(*(f"model.{each}.backbone." for each in ("student", "teacher")), tensors=dinov3()),
        "timm/vit_small_patch16_dinov3",
    )  # fmt: skip
    yield weighed(
        3, "`{model: …, model_ema: …}` of timm's own training", 0, r"under 'model_ema\.', one of several",
        lambda: {key: timm_tensors("vit_tiny_patch16_224") for key in ("model", "model_ema")},
        "timm/vit_tiny_patch16_224",
    )  # fmt: skip
    yield weighed(
        3, "CLIP of a student and a teacher, for timm", 0, r"matched 127 tensors.*one of several",
        lambda: prefixed("student.", "teacher.", tensors=openai_clip()), "timm/vit_xsmall_patch16_clip_224",
    )  # fmt: skip
    for name, store_as in {
        "`{state_dict: {module.visual.…}}`": lambda: {"state_dict": prefixed("module.", tensors=openai_clip())},
        "`model.visual.…`": lambda: prefixed("model.", tensors=openai_clip()),
        "`{model: {_orig_mod.module.visual.…}}`": lambda: {
            "model": prefixed("_orig_mod.module.", tensors=openai_clip())
        },
        "`visual.…` as OpenAI has it": openai_clip,
    }.items():
        told = r"matched \d+ tensors"
        yield weighed(3, f"CLIP, {name}", 0, told, store_as, "timm/vit_xsmall_patch16_clip_224")
    yield tensors_case(
        3, "transformers: all tensors under `module.`", 0, "matched 5", lambda held: prefixed("module.", tensors=held)
    )


def wrapper_segments() -> Iterator[Case]:
    for wrapper in ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "_forward_module"):
        make = partial(wrapped, BLOCK_OR_NORM, rf"\1.{wrapper}.")
        yield weighed(3, f"`blocks.0.{wrapper}.…`", 0, "matched 35 tensors", make)
    yield weighed(3, "`_orig_mod.…`", 0, "matched 35 tensors", lambda: prefixed("_orig_mod."))
    yield weighed(
        3, "all of them, one inside another", 0, "matched 35 tensors",
        lambda: wrapped(BLOCK_OR_NORM, r"_orig_mod._fsdp_wrapped_module.\1._checkpoint_wrapped_module._orig_mod."),
    )  # fmt: skip
    yield weighed(
        3, "timm: `blocks.0._checkpoint_wrapped_module.…`", 0, "matched 150 tensors",
        lambda: wrapped(BLOCK_OR_NORM, r"\1._checkpoint_wrapped_module.", timm_tensors("vit_tiny_patch16_224")),
        "timm/vit_tiny_patch16_224",
    )  # fmt: skip
    yield tensors_case(
        3, "transformers: `encoder.layer.0._orig_mod.…`", 0, r"matched \d+ tensors",
        lambda held: wrapped(r"(layer\.\d+)\.", r"\1._orig_mod.", held),
    )  # fmt: skip


def branches() -> Iterator[Case]:
    pair = ("student.backbone.", "teacher.backbone.")
    chosen = "under 'student.backbone.', one of several"
    listed = "several backbones: left, right; choose with --branch"
    yield weighed(3, "student and teacher", 0, "under 'teacher.backbone.', one of several", lambda: prefixed(*pair))
    yield weighed(
        3, "the same, `--branch student`", 0, chosen, lambda: prefixed(*pair), options=("--branch", "student")
    )
    yield weighed(3, "two that nobody can choose from", 65, listed, lambda: prefixed("left.", "right."))
    yield weighed(
        3, "the same, `--branch right`", 0, "under 'right.'", lambda: prefixed("left.", "right."),
        options=("--branch", "right"),
    )  # fmt: skip
    yield weighed(
        3, "`--branch` of a name that is not there", 65,
        "its backbones are student.backbone, teacher.backbone; name one of these", lambda: prefixed(*pair),
        options=("--branch", "pupil"),
    )  # fmt: skip
    yield weighed(
        3, "`--branch` of a file with one", 65, "use branch 'teacher'", dinov2, options=("--branch", "teacher")
    )


def heads_and_suffixes() -> Iterator[Case]:
    ignored = r"matched 35 tensors, 2 outside it ignored"
    for head in ("head", "linear_head"):
        yield weighed(
            3, f"dinov2: `{head}.weight`", 0, ignored,
            partial(with_head, head),
        )  # fmt: skip
    yield weighed(
        3, "dinov2: heads beside the backbone", 0,
        r"matched 35 tensors under 'teacher\.backbone\.', 1 outside it ignored",
        lambda: with_tensor(prefixed("teacher.backbone."), "teacher.dino_head.mlp.0.weight", 4, 64),
    )  # fmt: skip
    tiny = "vit_tiny_patch16_224"
    timm_told = "matched 150 tensors, 2 outside it ignored"
    yield weighed(3, "timm: a classifier", 0, timm_told, lambda: timm_tensors(tiny, num_classes=7), f"timm/{tiny}")
    yield folder_case(3, "hf: a classifier", 0, "2 outside it ignored", lambda _: None, "ViT classifier")
    for suffix in (".ckpt", ".bin", ".pth.tar", ".PTH", ".pkl", ""):
        yield weighed(3, f"torch.save, named `*{suffix}`", 0, "matched 35 tensors", dinov2, file=f"weights{suffix}")
    for first, second in ((".safetensors", ".pth"), (".pth", ".safetensors"), (".safetensors", ".SAFETENSORS")):

        def build(folder: Path, first: str = first, second: str = second) -> Call:
            store(folder / f"weights{first}", dinov2())
            (folder / f"weights{first}").rename(folder / f"weights{second}")
            return Call(("predict-defects", CUSTOM, "--weights", f"weights{second}", "--stage", "block"))

        yield Case(3, f"a `{first}` that is called `{second}`", 0, "matched 35 tensors", build)


def what_to_do_instead() -> Iterator[Case]:
    adapted = "base_model.model.blocks.0.attn.qkv.lora_A.default.weight"
    lora = "LoRA of peft; put it into its model with merge_and_unload"
    for model in (CUSTOM, "timm/vit_tiny_patch16_224"):
        yield weighed(3, f"LoRA keys alone, {model}", 65, lora, lambda: with_tensor({}, adapted, 8, 64), model)
    yield weighed(
        3, "LoRA beside the layers that it adapts", 65, lora,
        lambda: with_tensor(prefixed("base_model.model.", tensors=wrapped("qkv", "qkv.base_layer")), adapted, 8, 64),
    )  # fmt: skip

    def adapted_layers(held: Tensors) -> Tensors:
        layers = wrapped("query", "query.base_layer", prefixed("base_model.model.", tensors=held))
        return with_tensor(layers, "base_model.model.encoder.layer.0.attention.attention.query.lora_A.weight", 8, 32)

    yield tensors_case(3, "transformers: LoRA beside the layers", 65, "merge_and_unload", adapted_layers)

    def adapter(folder: Path) -> None:
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        store(folder / "adapter_model.safetensors", with_tensor({}, adapted, 8, 64))

    def adapter_as_weights(folder: Path) -> Call:
        adapter(folder / "lora")
        return Call(("predict-defects", CUSTOM, "--weights", "lora"))

    def adapter_as_model(folder: Path) -> Call:
        adapter(folder / "lora")
        return Call(("predict-defects", "hf/./lora"))

    yield Case(3, "folder with adapter_config.json, as weights", 66, "merge_and_unload", adapter_as_weights)
    yield Case(3, "folder with adapter_config.json, as a model", 66, "merge_and_unload", adapter_as_model)
    for model in (CUSTOM, "timm/vit_tiny_patch16_224"):
        yield weighed(
            3, f"flat shard of FSDP, {model}", 65, "teacher_checkpoint.pth",
            lambda: with_tensor(with_tensor({}, "blocks.0._flat_param", 100), "_flat_param", 9), model,
        )  # fmt: skip

    for name, code, given in (
        ("folder of a distributed checkpoint", 66, "step_9"),
        ("a file of a distributed checkpoint", 65, "step_9/__0_0.distcp"),
    ):

        def distributed(folder: Path, given: str = given) -> Call:
            (folder / "step_9").mkdir()
            (folder / "step_9" / ".metadata").write_bytes(pickle.dumps({}))
            (folder / "step_9" / "__0_0.distcp").write_bytes(bytes(100))
            return Call(("predict-defects", CUSTOM, "--weights", given))

        yield Case(3, name, code, "dcp_to_torch", distributed)


def other_architectures() -> Iterator[Case]:
    yield weighed(3, "SwiGLU as w1, w2, w3", 0, "matched 35 tensors", split_swiglu)
    names = "it is a DINOv3; name the model timm/vit_small_patch16_dinov3"
    for model in ("dinov2_vits14", CUSTOM):
        yield weighed(3, f"DINOv3 under {model}", 65, names, dinov3, model)
    vits14 = lambda: official("dinov2_vits14")  # noqa: E731
    reg4 = "timm/vit_small_patch14_reg4_dinov2"
    named = r"name the model timm/vit_small_patch14_dinov2$"
    yield weighed(3, "reg4 name for a file without registers", 65, named, vits14, reg4)
    yield weighed(
        3, "name without registers for a file with them", 65, f"name the model {reg4}$",
        lambda: official("dinov2_vits14_reg"), "timm/vit_small_patch14_dinov2",
    )  # fmt: skip
    yield weighed(3, "the same of the official names", 65, "name the model dinov2_vits14$", vits14, "dinov2_vits14_reg")
    yield weighed(3, "another official model's file", 65, "name the model dinov2_vits14$", vits14, "dinov2_vitb14")


def names_of_models() -> Iterator[Case]:
    predict = "predict-defects {}"
    yield line_case(3, "a repository as model", 2, "hf/facebook/dinov2-small", predict.format("facebook/dinov2-small"))
    yield line_case(3, "a file as model", 2, "with --weights|MODEL --weights FILE", predict.format("vits14.pth"))
    yield line_case(3, "a name in capitals", 2, r"did you mean dinov2_vits14", predict.format("DINOV2_VITS14"))
    yield line_case(3, "a URL as model", 2, "download the file", predict.format("https://example.org/vits14.pth"))
    weights = "predict-defects dinov2_vits14 --weights {}"
    yield line_case(
        3, "a URL as weights", 66, "fetch it first, and give --weights the file",
        weights.format("https://example.org/a.pth"),
    )  # fmt: skip
    yield line_case(
        3, "~ that no shell expanded", 66, "expands ~ only at the start",
        "predict-defects dinov2_vits14 --weights=~/a.pth",
    )  # fmt: skip
    yield line_case(
        3, "a pattern that no shell expanded", 66, "matches this pattern", weights.format("'weights/*.pth'")
    )


# 4. Photographs


def exif(*entries: bytes, data: bytes = b"") -> bytes:
    """EXIF of one directory; what does not fit an entry of 12 bytes comes after it."""
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    return head + b"".join(entries) + struct.pack("<I", 0) + data


TURNED = exif(  # orientation 6, and a resolution of −1/0
    struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHII", 0x011A, 10, 1, 38), data=struct.pack("<ii", -1, 0)
)


def lacking(*modules: str) -> dict[str, str]:
    """What makes a process do without some libraries."""
    return {"sitecustomize": MISSING.format(modules)}


def with_chunk(kind: bytes, data: bytes, photos: Path) -> None:
    """Put a chunk into the first photograph, behind its header of 33 bytes."""
    path = photos / "0.png"
    content = path.read_bytes()
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content[:33] + chunk + content[33:])


def looked_at(
    name: str,
    line: str,
    change: Callable[[Path], object],
    *options: str,
    code: int = 0,
    seen: str = IMAGES,
    grid: int = 5,
    section: int = 4,
    **given: Any,
) -> Case:
    """A case of `analyze` with three photographs, changed."""

    def build(folder: Path) -> Call:
        change(furnished(folder, grid))
        return Call((*LOOK, "photos", *options), **given)

    return Case(section, name, code, line, build, seen)


def pictures() -> Iterator[Case]:
    yield from metadata()
    yield from passed_over()
    yield from pages()
    yield from long_ones()


def metadata() -> Iterator[Case]:
    four = f"{IMAGES}4,"
    yield looked_at(
        "JPEG with orientation 6 and a rational −1/0", four,
        lambda photos: picture(9).save(photos / "a.jpg", exif=TURNED),
    )  # fmt: skip

    def twenty(folder: Path) -> Call:
        furnished(folder)
        for at in range(17):
            picture(at).save(folder / "photos" / f"{at}.jpg", **({"exif": TURNED} if at < 2 else {}))
        steps = ("--max-steps", "40", "--stop-clean-fraction", "1", "--eval-images", "1", "--workers", "0")
        return Call(("repair", CUSTOM, *TINY, "--data", "photos", *steps, "--out", "run"))

    yield Case(4, "two such among twenty, to repair", 0, r'"stopped_by"', twenty)
    large = zlib.compress(b"x" * 2_000_000)
    for name, kind, data in (
        ("2 MB of text", b"zTXt", b"prompt\0\0" + large),
        ("2 MB of international text", b"iTXt", b"prompt\0\1\0\0\0" + large),
        ("2 MB of colour profile", b"iCCP", b"icc\0\0" + large),
    ):
        yield looked_at(
            f"PNG with {name}", f"{IMAGES}3,",
            partial(with_chunk, kind, data),
        )  # fmt: skip


def passed_over() -> Iterator[Case]:
    counted = "passed over: {}"
    yield looked_at(".jfif", f"{IMAGES}4,", lambda photos: picture(9).save(photos / "a.jfif", "JPEG"))

    def heic(photos: Path) -> None:
        import pillow_heif

        pillow_heif.register_heif_opener()
        picture(9).save(photos / "a.heic")

    yield looked_at(".heic with the extra", f"{IMAGES}4,", heic)
    told = counted.format(r"1 \.heic \(a\.heic; pip install 'sinder-cli\[heic\]' to read them\)")
    yield looked_at(".heic without the extra", told, heic, modules=lacking("pillow_heif"))
    yield looked_at(".avif", f"{IMAGES}4,", lambda photos: picture(9).save(photos / "a.avif"))
    yield looked_at(
        "a dangling link", counted.format(r"1 dangling link \(a\.png\)"),
        lambda photos: (photos / "a.png").symlink_to("gone"),
    )  # fmt: skip

    def texts(photos: Path) -> None:
        for at in range(2):
            (photos / f"{at}.txt").write_text("a caption")

    yield looked_at("text files", counted.format("2 text files"), texts)
    for name in (".ipynb_checkpoints", "@eaDir"):

        def beside(photos: Path, name: str = name) -> None:
            photographs(photos / name, 2)

        yield looked_at(f"`{name}`, with two pictures", counted.format(rf"1 hidden folder \({name}\)"), beside)

    def named(folder: Path) -> Call:
        furnished(folder)
        photographs(folder / "photos" / ".ipynb_checkpoints", 2)
        return Call((*LOOK, "photos/.ipynb_checkpoints"))

    yield Case(4, "a hidden folder that is named", 0, f"{IMAGES}2,", named)

    def many(photos: Path) -> None:
        texts(photos)
        photographs(photos / ".cache", 1)
        (photos / "a.png").symlink_to("gone")
        (photos / "._0.png").write_bytes(b"")
        os.mkfifo(photos / "pipe.png")

    yield looked_at(
        "all of these in one line", counted.format(r"2 text files, 1 dangling .*, 1 hidden .*, 1 special"), many
    )


def pages() -> Iterator[Case]:
    for suffix in (".tif", ".gif", ".webp", ".png"):

        def two(photos: Path, suffix: str = suffix) -> None:
            pages = {"save_all": True, "append_images": [picture(2)], "lossless": True}
            picture(1).save(photos / f"a{suffix}", **pages)

        yield looked_at(f"{suffix} of two pages or frames", "first page or frame|first of|only the first", two)


def long_ones() -> Iterator[Case]:
    told = r"1 image .*scaled down to at most .* patch tokens \(--max-tokens\)"
    narrow = r"skipped photos/a\.png: .* too narrow.*; raise --max-tokens, or crop"

    def strip(photos: Path) -> None:
        picture(1, 1024, 32).save(photos / "a.png")

    def line(photos: Path) -> None:
        picture(1, 5000, 2).resize((5000, 1)).save(photos / "a.png")

    yield looked_at("a strip of 32×1024 px", told, strip, grid=37)
    yield looked_at("the same, `--max-tokens 2000`", told, strip, "--max-tokens", "2000", grid=37)
    yield looked_at("the same, `--max-tokens 100`", narrow, strip, "--max-tokens", "100", grid=37)
    yield looked_at("a strip of 1×5000 px", narrow, line, grid=37, seen="skipped|no image could")


# 5. Lists and names


def listed(
    name: str, line: str, write: Callable[[Sequence[str]], bytes], *extra: str, place: str = "-", code: int = 0
) -> Case:
    """A case of `analyze` with a list of three photographs and others, on standard input or in a file."""

    def build(folder: Path) -> Call:
        furnished(folder)
        names = [f"photos/{at}.png" for at in range(3)]
        for other in extra:
            picture(9).save(folder / other)
        content = write([*extra, *names])
        if place != "-":
            (folder / place).write_bytes(content)
        return Call((*LOOK, place), stdin=content if place == "-" else b"")

    return Case(5, name, code, line, build, IMAGES)


def lists() -> Iterator[Case]:
    def lines(names: Sequence[str]) -> bytes:
        return "".join(f"{name}\n" for name in names).encode()

    def windows(names: Sequence[str]) -> str:
        return "".join(f"{name}\r\n" for name in names)

    def nul(names: Sequence[str]) -> bytes:
        return "".join(f"{name}\0" for name in names).encode()

    three, four = f"{IMAGES}3,", f"{IMAGES}4,"
    yield listed("a list with U+2028 in a name", four, lines, "a\u2028b.png")
    yield listed("a list with U+0085 in a name", four, lines, "a\u0085b.png")
    yield listed("a list that begins with a byte order mark", three, lambda names: b"\xef\xbb\xbf" + lines(names))
    yield listed("a list in UTF-16, as PowerShell writes it", three, lambda names: windows(names).encode("utf-16"))
    yield listed("UTF-16 without a mark", three, lambda names: windows(names).encode("utf-16-le"))
    yield listed("`find -print0`", three, nul)
    yield listed("`find -print0`, a newline in a name", four, nul, "a\nb.png")
    yield listed("`--data list.txt`", three, lines, place="list.txt")
    yield listed("`--data list.txt` in UTF-16", three, lambda names: windows(names).encode("utf-16"), place="list.txt")
    yield listed("`--data list`, no suffix", r"a list of images ends in \.txt", lines, place="list", code=65)
    yield from control_characters()


def control_characters() -> Iterator[Case]:
    escaped = r"a\\x1b\[31m\.png"
    yield looked_at(
        "a broken picture with ESC in its name", rf"^sinder: warning: skipped photos/{escaped}: ",
        lambda photos: (photos / "a\x1b[31m.png").write_bytes(b"no picture"), section=5, seen="a.*png",
    )  # fmt: skip
    yield looked_at(
        "a broken picture with a newline in its name", r"^sinder: warning: skipped photos/a\\nb\.png: ",
        lambda photos: (photos / "a\nb.png").write_bytes(b"no picture"), section=5, seen=r"b\.png",
    )  # fmt: skip
    yield looked_at(
        "the same with ESC, in report.html", f">photos/{escaped}<",
        lambda photos: (photos / "a\x1b[31m.png").write_bytes(b"no picture"), "--out", "look", "--figures", "0",
        section=5, seen=r"a.\[31m", shown="look/report.html",
    )  # fmt: skip
    yield line_case(
        5, "a missing file with ESC in its name", 66, r"gone\\x1b\[2J", "analyze demo_vit --data 'gone\x1b[2J'"
    )
    yield line_case(5, "a model with ESC in its name", 2, r"unknown model 'demo\\+x1b", "predict-defects 'demo\x1b[2J'")

    def card(folder: Path) -> Call:
        shutil.move(furnished(folder), folder / "a\x1b[31mb")
        return Call(
            ("repair", "demo_vit", "--data", "a\x1b[31mb", *STEP, "--image-size", "112", "--out", "run"),
            shown="run/README.md",
        )

    yield Case(5, "a folder with ESC in its name, in the model card", 1, r"a\\x1b\[31mb", card, r"a.\[31mb")


# 6. Messages


def messages() -> Iterator[Case]:
    yield from values()
    yield from outputs()
    yield from leaks()
    yield from errors_of_our_own()


def values() -> Iterator[Case]:
    def settings(text: str) -> Callable[[Path], Call]:
        def build(folder: Path) -> Call:
            furnished(folder)
            (folder / "settings.toml").write_text(text)
            return Call(("repair", "demo_vit", "--config", "settings.toml", "--out", "run"))

        return build

    run = "repair demo_vit --out run {}"
    for name, line, options in (
        ("a number in words", "it must be a whole number, not 'many'", "--batch-size many"),
        ("a value out of range", "it must be above 0, not 0", "--lr 0"),
        ("`--lr 100`", "it must be 10 or less, not 100", "--lr 100"),
        ("`--lr inf`", "it must be a finite number", "--lr inf"),
        ("a device of no kind", "not 'tpu'", "--device tpu"),
        ("a kernel that there is not", "it must be 3 or 5, not 4", "--kernel 4"),
        ("a tracker that there is not", "'tensorboard' or 'wandb'", "--log foo"),
    ):
        yield line_case(6, name, 2, line, run.format(options))
    for name, line, text in (
        ("settings: a text for a number", "max_steps", "max_steps = 'many'\n"),
        ("settings: a list for a number", "lr", "lr = [1]\n"),
        ("settings: a name that is none", "steps", "steps = 3\n"),
        ("settings: no TOML", r"settings\.toml", "max_steps: 3\n"),
    ):
        yield Case(6, name, 2, rf"^sinder: error: (?!.*pydantic)(?!.*Input should).*{line}", settings(text))


def outputs() -> Iterator[Case]:
    yield looked_at(
        "`analyze -o x.json`", '"schema_version"', lambda _: None, "-o", "x.json", section=6, seen="", shown="x.json"
    )
    yield looked_at("`analyze -o x.html`", "give --out", lambda _: None, "-o", "x.html", section=6, seen="", code=2)
    yield line_case(
        6, "ONNX of any size, where that comes out wrong", 65, r"^.{0,200}; leave --dynamic-size out$",
        f"export {CUSTOM} {' '.join(TINY)} --to onnx --dynamic-size --out a.onnx",
    )  # fmt: skip
    yield line_case(
        6, "an unwritable place", 73, "cannot create",
        f"analyze {CUSTOM} {' '.join(TINY)} --data photos --out tiny.safetensors/look",
    )  # fmt: skip
    yield line_case(
        6, "a folder in use", 73, "not empty", f"analyze {CUSTOM} {' '.join(TINY)} --data photos --out photos"
    )
    yield line_case(6, "a suffix that there is not", 2, r"\.safetensors", "export demo_vit --to native --out a.zip")
    yield line_case(
        6, "a full disk", 74, "cannot write", f"export {CUSTOM} {' '.join(TINY)} --to native --out a.pth",
        most_file_bytes=100_000,
    )  # fmt: skip
    yield line_case(6, "a full disk behind standard output", 74, "No space left", "backbones", stdout="/dev/full")


def leaks() -> Iterator[Case]:
    def protocol(folder: Path) -> Call:
        import torch

        torch.save(dinov2(), folder / "weights.pth", pickle_protocol=4)
        return Call(("predict-defects", CUSTOM, "--weights", "weights.pth", "--stage", "block"))

    yield Case(6, "a checkpoint of pickle protocol 4", 65, "^sinder: .*torch.save|matched 35", protocol)

    def card(folder: Path) -> Call:
        photos = furnished(folder)
        options = (*STEP, "--image-size", "112", "--out", "run")
        return Call(("repair", "demo_vit", "--data", photos, *options), shown="run/README.md")

    yield Case(6, "a model card names no local path", 1, r"^[^…/]*images: .*`photos`", card, r"images, .*photos`")

    def exported(folder: Path) -> Call:
        furnished(folder)
        weights = folder / "tiny.safetensors"
        arguments = ("export", CUSTOM, "--weights", weights, "--to", "transformers", "--no-verify", "--out", "out")
        return Call(arguments, shown="out/README.md")

    yield Case(6, "nor does that of an export", 0, r"^[^…]*tiny\.safetensors[^…]*$", exported, r"\|.*tiny\.safetensors")
    for name, modules, command in (
        ("timm is not installed", "timm", "predict-defects timm/vit_tiny_patch16_224 --weights tiny.safetensors"),
        ("transformers is not installed", "transformers", "analyze hf/./vit --data photos --workers 0"),
        ("onnx is not installed", "onnx onnxscript", f"export {CUSTOM} {' '.join(TINY)} --to onnx --out a.onnx"),
    ):

        def build(folder: Path, modules: str = modules, command: str = command) -> Call:
            furnished(folder)
            if "hf/" in command:
                transformers_folder(folder)
            return Call(shlex.split(command), modules=lacking(*modules.split()))

        yield Case(6, name, 69, r"install .*sinder-cli\[", build)


def errors_of_our_own() -> Iterator[Case]:
    tiny = f"{CUSTOM} {' '.join(TINY)}"
    for name, code, line, command in (
        ("a missing folder", 66, "no such file or folder", "analyze demo_vit --data gone"),
        ("an empty folder", 66, "no images in empty", "repair demo_vit --data empty --out run"),
        ("nothing on standard input", 66, "no images in", "analyze demo_vit --data -"),
        ("missing weights", 66, "no such file", "predict-defects dinov2_vits14 --weights gone.pth"),
        ("a photograph as weights", 65, "neither a safetensors", f"predict-defects {CUSTOM} --weights photos/0.png"),
        ("photographs as weights", 66, "neither model.safetensors", f"predict-defects {CUSTOM} --weights photos"),
        ("a misspelt model", 2, "did you mean demo_vit", "predict-defects demo_vitt"),
        ("an option that there is not", 2, "--steps", "repair demo_vit --steps 3"),
        ("a command that there is not", 2, "mend", "mend demo_vit"),
        ("no model", 2, "MODEL", "repair"),
        ("images of too few patches", 2, "--image-size 70", f"analyze {tiny} --data photos --image-size 60"),
        ("a GPU that there is not", 69, "--device cpu", "repair demo_vit --device cuda --out run"),
        ("heads that do not divide the width", 2, "give other --heads", f"predict-defects {tiny} --heads 7"),
        ("a revision of what has none", 2, "leave --revision out", "predict-defects demo_vit --revision main"),
        ("a folder that is no run", 66, "no run directory", "export ./empty --to native --out a.pth"),
        ("to go on with no run", 66, "no run", "repair ./empty --resume"),
        (
            "an adapter of other weights",
            65,
            "adapter|not of these weights",
            f"predict-defects {tiny} --adapter tiny.safetensors",
        ),
    ):
        yield line_case(6, name, code, line, command)


# 7. Hostile files


def hostile() -> Iterator[Case]:
    yield from hostile_configs()
    yield from hostile_weights()
    yield from hostile_pictures()
    yield from hostile_settings()


def hostile_configs() -> Iterator[Case]:
    for words, value in {"10¹²": 10**12, "10⁶": 10**6, "10³⁰": 10**30, "−1": -1, "null": None, "a text": "3"}.items():
        line = "num_hidden_layers|blocks, and its weights have 54 tensors"
        yield config_case(7, f"num_hidden_layers {words}", 65, line, num_hidden_layers=value)
    for words, eps in {"10¹²": 1e12, "−1": -1, "NaN": float("nan"), "infinity": float("inf")}.items():
        yield config_case(7, f"layer_norm_eps {words}", 65, "layer_norm_eps is", layer_norm_eps=eps)
    yield config_case(7, "hidden_size 10¹²", 65, "mis-shaped|hidden_size", hidden_size=10**12)
    yield config_case(7, "image_size 10¹²", 65, "mis-shaped|image_size", image_size=10**12)
    yield config_case(7, "intermediate_size 10³⁰", 65, "mis-shaped|intermediate_size", intermediate_size=10**30)
    yield config_case(7, "num_attention_heads a list", 65, "num_attention_heads is", num_attention_heads=[2])
    yield config_case(7, "code of its own (auto_map)", 65, "never run", auto_map={"AutoModel": "evil.Evil"})
    for name, content in (
        ("100 000 brackets", b"[" * 100_000),
        ("a number of 5000 digits", b"9" * 5000),
        ("nothing", b""),
    ):

        def written(vit: Path, content: bytes = content) -> None:
            (vit / "config.json").write_bytes(content)

        yield folder_case(7, f"config.json: {name}", 65, r"cannot read .*config\.json", written)
    for name, shard in (("climbs out", "../outside.safetensors"), ("is absolute", "/etc/passwd.safetensors")):

        def build(folder: Path, shard: str = shard) -> Call:
            vit = transformers_folder(folder)
            (vit / "model.safetensors").rename(folder / "outside.safetensors")
            (vit / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
            return Call(("predict-defects", "hf/./vit"))

        yield Case(7, f"an index whose path {name}", 65, "outside the folder", build)


class Payload:
    """What a pickle can do to whoever trusts it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {EXECUTED}",)


def hostile_weights() -> Iterator[Case]:
    def header(change: Callable[[dict[str, Any]], object], length: int | None = None) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            content = path.read_bytes()
            size = int.from_bytes(content[:8], "little")
            table = json.loads(content[8 : 8 + size])
            change(table)
            text = json.dumps(table).encode()
            path.write_bytes((length or len(text)).to_bytes(8, "little") + text + content[8 + size :])

        return write

    def tensor(**entries: Any) -> Callable[[Path], None]:
        return header(lambda table: table["norm.weight"].update(entries))

    def damaged(suffix: str, name: str, write: Callable[[Path], object], line: str = "cannot read weights") -> Case:
        def build(folder: Path) -> Call:
            store(folder / f"weights{suffix}", dinov2())
            write(folder / f"weights{suffix}")
            return Call(("predict-defects", CUSTOM, "--weights", f"weights{suffix}"))

        return Case(7, name, 65, line, build)

    safe, torch_file = ".safetensors", ".pth"
    yield damaged(safe, "safetensors: a header of 2⁶³ − 1 bytes", header(lambda _: None, 2**63 - 1))
    yield damaged(safe, "safetensors: a shape of 10¹²", tensor(shape=[10**12]))
    yield damaged(safe, "safetensors: offsets past the end", tensor(data_offsets=[0, 10**12]))
    yield damaged(safe, "safetensors: offsets backwards", tensor(data_offsets=[256, 0]))
    yield damaged(safe, "safetensors: a dtype that there is not", tensor(dtype="Q4"))
    yield damaged(
        safe, "safetensors: cut off", lambda path: path.write_bytes(path.read_bytes()[:-1000]), "fetch it again"
    )
    yield damaged(
        torch_file, "torch.save: cut off", lambda path: path.write_bytes(path.read_bytes()[:-300]), "fetch it again"
    )

    def short_storage(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data[:8] if name.endswith("/data/0") else data)
            archive.writestr(f"../{EXECUTED}", "out of the folder")

    yield damaged(torch_file, "torch.save: a short storage, and a member that climbs out", short_storage)
    for name, write in {
        "a pickle with a payload": lambda path: path.write_bytes(pickle.dumps({"a": Payload()})),
        "torch.save with a payload": lambda path: store(path, {"model": dinov2(), "args": Payload()}),
    }.items():

        def build(folder: Path, write: Callable[[Path], object] = write) -> Call:
            write(folder / "weights.pth")
            return Call(("predict-defects", CUSTOM, "--weights", "weights.pth"))

        yield Case(7, name, 65, "never trusted|cannot be read safely", build)
    yield weighed(
        7, "DINOv2 whose blocks are numbered up to 10¹²", 65, r"blocks up to|unexpected",
        lambda: with_tensor(dinov2(), f"blocks.{10**12}.norm1.weight", 64),
    )  # fmt: skip


def hostile_pictures() -> Iterator[Case]:
    def bomb(photos: Path) -> None:
        content = (photos / "0.png").read_bytes()
        head = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
        (photos / "bomb.png").write_bytes(content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:])

    def lying(photos: Path) -> None:
        picture().save(photos / "lying.jpg")
        content = (photos / "lying.jpg").read_bytes()
        (photos / "lying.jpg").write_bytes(
            content.replace(struct.pack(">HH", 80, 90), struct.pack(">HH", 9000, 8000), 1)
        )

    def cut(photos: Path) -> None:
        picture().save(photos / "cut.jpg")
        (photos / "cut.jpg").write_bytes((photos / "cut.jpg").read_bytes()[:1000])

    for name, line, change in (
        ("PNG of 60 000 × 60 000 px", r"bomb\.png", bomb),
        ("JPEG that says 8000 × 9000 px", r"lying\.jpg.*too many", lying),
        ("JPEG cut off", r"cut\.jpg", cut),
        ("a web page called .jpg", r"page\.jpg", lambda photos: (photos / "page.jpg").write_text("<html>")),
    ):
        yield looked_at(name, rf"^sinder: .*{line}", change, section=7)


def hostile_settings() -> Iterator[Case]:
    def settings(text: str) -> Callable[[Path], Call]:
        def build(folder: Path) -> Call:
            (folder / "settings.toml").write_text(text)
            return Call(("repair", "demo_vit", "--config", "settings.toml", "--out", "run"))

        return build

    for name, text in (
        ("brackets, 5000 deep", f"lr = {'[' * 5000}"),
        ("10³⁰ steps", f"max_steps = {10**30}"),
        ("NaN", "lr = nan"),
    ):
        yield Case(7, f"settings: {name}", 2, r"^sinder: error: ", settings(text))

    def resumed(change: Callable[[Path], object]) -> Callable[[Path], Call]:
        def build(folder: Path) -> Call:
            furnished(folder)
            made = ("repair", CUSTOM, *TINY, "--data", "photos", *STEP, "--out", "run")
            return Call(("repair", "run", "--resume"), first=made, then=lambda: change(folder / "run" / "config.json"))

        return build

    for name, code, line, change in (
        ("nothing in it", 65, r"config\.json", lambda path: path.write_bytes(b"")),
        ("a list", 65, r"config\.json", lambda path: path.write_bytes(b"[]")),
        ("100 000 brackets", 65, r"config\.json", lambda path: path.write_bytes(b"[" * 100_000)),
        ("settings null", 78, "damaged .*settings", lambda path: change_json(path, settings=None)),
        ("a model that is a number", 78, "model was", lambda path: change_json(path, model=10**30)),
    ):
        yield Case(7, f"config.json of a run: {name}", code, line, resumed(change))


# 8. Children and signals


def signals() -> Iterator[Case]:
    def running(steps: int, *numbers: signal.Signals) -> Callable[[Path], Call]:
        def build(folder: Path) -> Call:
            furnished(folder)
            options = ("--eval-images", "1", "--stop-clean-fraction", "1", "--workers", "1", "--image-size", "112")
            arguments = ("repair", "demo_vit", "--data", "photos", "--max-steps", str(steps), "--out", "run", *options)
            return Call(arguments, signals=numbers)

        return build

    many = 100_000
    yield Case(8, "under nohup: SIGTERM", -15, "^sinder: terminated", running(many, signal.SIGTERM))
    yield Case(
        8, "under nohup: SIGHUP, then SIGTERM", -15, "^sinder: terminated", running(many, signal.SIGHUP, signal.SIGTERM)
    )
    yield Case(8, "under nohup: SIGHUP", 0, '"stopped_by"', running(20, signal.SIGHUP))
    yield Case(8, "in a script's background: SIGINT", 0, '"stopped_by"', running(20, signal.SIGINT))

    def suite(_: Path) -> Call:
        program = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "TESTS/cli/test_cli_resume.py")
        return Call(("-k", "a_signal_finishes_the_step"), program=program, signals=(signal.SIGCONT,), patience=300)

    yield Case(8, "the tests of signals, started by nohup", 0, r"3 passed", suite, r"\d passed|\d failed")


# Running and writing


def cases() -> list[Case]:
    groups = (libraries, silent_changes, containers, pictures, lists, messages, hostile, signals)
    return [case for group in groups for case in group()]


def run(case: Case, root: Path, checkout: Path | None) -> tuple[str, Ended]:
    """Build the input of a case in a folder of its own and run it; the command, and how it ended."""
    folder = root / "case"
    folder.mkdir()
    (root / "tmp").mkdir()
    try:
        call = case.build(folder)
        if call.first:
            started(Call(call.first), root, checkout)
            call.then()
        began = time.monotonic()
        code, out, errors = started(call, root, checkout)
        seconds = time.monotonic() - began
        written = folder / call.shown
        read = written.read_text(errors="replace") if written.is_file() else ""
        printed = [lines_of(text, root, checkout) for text in (errors, out, read)]
        name = "sinder" if call.program[-1] == "sinder_cli" else "pytest"
        command = f"{name} {' '.join(shlex.quote(str(each)) for each in call.arguments)}"
        lines = [line for text in printed for line in text]
        ended = Ended(code, seconds, (folder / EXECUTED).exists(), printed[0], lines)
        return placeless(command, root, checkout), ended
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(root / "tmp")


def started(call: Call, root: Path, checkout: Path | None) -> tuple[int | None, str, str]:
    """How the process of a call ended (None: it was stopped), and what it printed on standard output and error."""
    folder = root / "case"
    for name, text in call.modules.items():
        (root / "tmp" / "modules").mkdir(exist_ok=True)
        (root / "tmp" / "modules" / f"{name}.py").write_text(text)
    tests = str((checkout or TESTS.parent) / "tests")
    program = [part.replace("TESTS", tests) for part in call.program]
    with (
        (folder.parent / "tmp" / "in").open("w+b") as given,
        Path(call.stdout).open("wb") if call.stdout else (root / "tmp" / "out").open("wb") as out,
        (root / "tmp" / "errors").open("wb") as errors,
    ):
        given.write(call.stdin)
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, *program, *map(str, call.arguments)],
            stdin=given,
            stdout=out,
            stderr=errors,
            cwd=folder,
            env=environment(root, checkout),
            start_new_session=True,
            preexec_fn=lambda: limited(call),
        )
        code = waited(process, call, folder / "run" / "metrics.jsonl")
    printed = [root / "tmp" / name for name in ("out", "errors")]
    texts = [path.read_bytes().decode(errors="backslashreplace") if path.exists() else "" for path in printed]
    return code, texts[0], texts[1]


def waited(process: subprocess.Popen[bytes], call: Call, first_step: Path) -> int | None:
    """Send the signals after the first step and wait; the exit code, or None for a process that takes too long."""
    end = time.monotonic() + call.patience
    if call.signals:
        while not first_step.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
    for number in call.signals:
        process.send_signal(number)
        time.sleep(0.3)
    try:
        return process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()
        return None


def environment(root: Path, checkout: Path | None) -> dict[str, str]:
    """One thread, empty caches, and the modules that are to be found first."""
    kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
    paths = [str(root / "tmp" / "modules"), *([str(checkout)] if checkout else [])]
    places = {name: str(root / "tmp") for name in ("HOME", "TORCH_HOME", "HF_HOME", "TMPDIR")}
    return kept | places | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def limited(call: Call) -> None:
    """In the child: limits, and signals as a terminal leaves them, or nohup and a shell's background."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if call.most_file_bytes >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (call.most_file_bytes, call.most_file_bytes))
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if call.signals else signal.SIG_DFL)


def lines_of(text: str, root: Path, checkout: Path | None) -> list[str]:
    """The lines of a text that are not empty; no other character ends a line."""
    return [placeless(line, root, checkout) for line in text.split("\n") if line.strip()]


def placeless(text: str, root: Path, checkout: Path | None) -> str:
    """The text without the places of this machine."""
    for place in (root / "case", root, checkout, TESTS.parent, Path(sys.prefix), Path(sys.base_prefix)):
        if place is not None:
            text = text.replace(str(place), "…")
    return text


def cell(text: str) -> str:
    """A line for a table: short, with pictures of control characters."""
    shown = "".join(c if c.isprintable() else picture_of(c) for c in text.strip())
    if len(shown) > MOST_CHARACTERS:
        shown = f"{shown[: MOST_CHARACTERS - ENDING - 1]}…{shown[-ENDING:]}"
    return f"`{shown.replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def picture_of(character: str) -> str:
    """What stands for a character that cannot be printed: a raw ESC is not to be taken for one that is escaped."""
    return chr(0x2400 + ord(character)) if ord(character) < 0x20 else f"<U+{ord(character):04X}>"


def outcome(case: Case, ended: Ended) -> str:
    mark = WANTED if ended.is_as_expected(case) else UNWANTED
    return f"{mark} {ended}: {cell(ended.shown(case))}"


def kept_rows() -> dict[str, list[str]]:
    """The rows of CASES.md by the name of the case."""
    text = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    rows = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in text.split("\n") if line.startswith("| ")]
    return {row[0]: row for row in rows if len(row) == 4}


def document(rows: Mapping[str, Sequence[str]]) -> str:
    """CASES.md."""
    everything = cases()
    known = [rows[case.name] for case in everything if case.name in rows]
    counts = [sum(row[column].startswith(WANTED) for row in known) for column in (2, 3)]
    lines = [
        "# What users bring, case by case",
        "",
        "Written by `python tests/reports/cases.py`, which builds each input and runs the command on it, in a process"
        f" of its own with one thread, {MOST_BYTES >> 30} GB of address space and {PATIENCE:.0f} s. Models are small"
        " and random. *Before* is the version that the cases were collected with (`--before`). The line"
        f" is the one that the case is about, or the last. {WANTED}: it ends as it should; {UNWANTED}: it does not. `…`"
        " stands for folders of the machine and for what is cut out, ␛ for a raw ESC.",
        "",
        f"{len(known)} cases; {counts[0]} of them ended so before, {counts[1]} do now.",
    ]
    for section, title in SECTIONS.items():
        lines += ["", f"## {section}. {title}", "", "| case | input | before | now |", "|---|---|---|---|"]
        lines += [
            f"| {' | '.join(rows[case.name])} |" for case in everything if case.section == section and case.name in rows
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Run `sinder` on what users bring, and write CASES.md.")
    parser.add_argument("--cases", default="", metavar="REGEX", help="Those whose names match; default: all.")
    parser.add_argument("--before", type=Path, metavar="PATH", help="Run a checkout of an earlier version too.")
    chosen = parser.parse_args()
    rows, failed, everything = kept_rows(), [], cases()
    assert len({case.name for case in everything}) == len(everything)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary).resolve()
        for case in everything:
            if not re.search(chosen.cases, case.name):
                continue
            before = rows.get(case.name, ["", "", "", ""])[2]
            if chosen.before:
                before = outcome(case, run(case, root, chosen.before.resolve())[1])
            command, ended = run(case, root, None)
            rows[case.name] = [case.name, cell(command), before, outcome(case, ended)]
            if not ended.is_as_expected(case):
                failed.append(case.name)
            print(f"{case.section} {case.name}\n    {before}\n    {rows[case.name][3]}", flush=True)
            DOCUMENT.write_text(document(rows), encoding="utf-8")
    print(json.dumps({"failed": failed}, ensure_ascii=False))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
