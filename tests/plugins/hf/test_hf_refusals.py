"""What cannot be used is refused in one line, before a module is built and before anything of it is run."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from sinder_plugins.hf.config import REFUSED
from sinder_plugins.hf.families import FAMILIES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sinder_cli import Backbone, BadInputError, ModelRequest, NoInputError, SinderError, UsageError, api

Saved = Callable[[str], Path]
Opened = Callable[..., Backbone]


@pytest.fixture
def folder(saved: Saved, tmp_path: Path) -> Path:
    """A folder of a ViT that a test may spoil."""
    return Path(shutil.copytree(saved("ViT"), tmp_path / "folder"))


def change(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def refusal(opened: Opened, folder: Path) -> SinderError:
    with pytest.raises(SinderError) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert caught.value.remedy
    return caught.value


BLOCKS = {
    "swinv2": "Swinv2Layer of its swinv2 is post-norm: ",
    "swin": "SwinLayer of its swin is hierarchical: ",
    "hiera": "HieraLayer of its hiera is hierarchical: ",
    "convnext": "ConvNextLayer of its convnext is convolutional: ",
    "resnet": "ResNetBottleNeckLayer of its resnet is convolutional: ",
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_that_cannot_be_expressed_are_named_with_the_reason(kind: str, folder: Path, opened: Opened) -> None:
    change(folder, model_type=kind)
    error = refusal(opened, folder)
    assert error.why.startswith(BLOCKS[kind])
    assert error.exit_code == 65


@pytest.mark.parametrize("kind", REFUSED)
def test_the_library_has_every_family_and_block_that_is_refused(kind: str) -> None:
    block, _ = REFUSED[kind]
    found = [
        path
        for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
        if f"class {block}(" in path.read_text()
    ]
    assert found
    assert kind in CONFIG_MAPPING_NAMES or kind == "maskformer-swin"
    assert kind not in FAMILIES


def test_a_mixture_of_experts_is_refused_in_any_family(folder: Path, opened: Opened) -> None:
    change(folder, num_experts=8)
    assert "mixture of experts" in refusal(opened, folder).why


def test_an_unknown_family_is_refused_with_those_known(folder: Path, opened: Opened) -> None:
    change(folder, model_type="bert")
    error = refusal(opened, folder)
    assert error.why == "its model_type 'bert' is not supported"
    assert all(kind in error.remedy for kind in ("dinov2", "siglip_vision_model"))


def test_a_model_with_code_of_its_own_is_refused(folder: Path, opened: Opened) -> None:
    change(folder, auto_map={"AutoModel": "modeling_mine.Mine"})
    (folder / "modeling_mine.py").write_text("raise SystemExit('it was run')")
    assert "code of a checkpoint is never run" in refusal(opened, folder).why


class Trap:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickled_sidecar_is_never_opened(folder: Path, opened: Opened, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "opened")))
    assert opened(folder).depth == 3
    (folder / "model.safetensors").unlink()
    assert "only as pickles, which are not opened unless they are named" in refusal(opened, folder).why
    assert not (tmp_path / "opened").exists()


def test_a_shard_outside_the_folder_is_refused(folder: Path, opened: Opened) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "../outside.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "outside the folder" in refusal(opened, folder).why


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "an activation": ({"hidden_act": "mish"}, "its activation 'mish' is not supported"),
    "channels": ({"num_channels": 4}, "images of 4 channels"),
    "a count": ({"num_hidden_layers": 0}, "num_hidden_layers is 0, no count"),
    "a word": ({"hidden_size": "32"}, "hidden_size is '32', no count"),
    "a switch for a count": ({"hidden_size": True}, "hidden_size is True, no count"),
    "heads": ({"num_attention_heads": 5}, "hidden_size 32 is no multiple of num_attention_heads 5"),
    "an oblong patch": ({"patch_size": [8, 16]}, r"patch_size is \[8, 16\], no square"),
    "an oblong image": ({"image_size": [40, 80]}, r"image_size is \[40, 80\], no square"),
    "an image without a patch": ({"image_size": 4}, "have no patch of 8"),
    "an epsilon": ({"layer_norm_eps": -1}, "layer_norm_eps is -1, no number"),
}


@pytest.mark.parametrize(("changes", "why"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_that_makes_no_sense_is_refused(
    changes: dict[str, Any], why: str, folder: Path, opened: Opened
) -> None:
    change(folder, **changes)
    with pytest.raises(BadInputError, match=why):
        opened(folder)


def test_squares_may_be_written_as_pairs(folder: Path, opened: Opened) -> None:
    change(folder, image_size=[40, 40], patch_size=[8, 8])
    assert (opened(folder).image_size, opened(folder).patch_size) == (40, 8)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_a_config_that_is_no_table_is_refused(text: str, folder: Path, opened: Opened) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    error = refusal(opened, folder)
    assert (error.what, error.exit_code) == (f"cannot read {folder}/config.json", 65)


def test_a_config_of_gigabytes_is_not_read(folder: Path, opened: Opened) -> None:
    with (folder / "config.json").open("r+b") as file:
        file.truncate(1 << 30)
    assert "it has more than 4 MB" in refusal(opened, folder).why


def test_a_folder_without_config_or_weights_is_no_input(folder: Path, opened: Opened) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(NoInputError, match="the folder has neither model"):
        opened(folder)
    (folder / "config.json").unlink()
    with pytest.raises(NoInputError, match="there is no config"):
        opened(folder)
    with pytest.raises(NoInputError, match="there is no such folder"):
        opened(folder / "absent")


def test_a_folder_has_no_revisions(folder: Path, opened: Opened) -> None:
    with pytest.raises(UsageError, match=r"cannot use revision 'main': .* is a folder"):
        opened(folder, revision="main")


def test_a_model_that_is_on_no_hub_has_no_revisions() -> None:
    with pytest.raises(UsageError, match="cannot use revision 'main': demo_vit does not come from a hub") as error:
        api.open_model(ModelRequest("demo_vit", revision="main"))
    assert error.value.exit_code == 2


def test_a_name_that_no_repository_can_have_is_refused() -> None:
    for name in ("hf/", "hf/alone", "hf/a/b/c", "hf/a b/c"):
        with pytest.raises(UsageError, match="neither a local folder nor OWNER/NAME"):
            api.open_model(ModelRequest(name))


def test_weights_of_another_file_are_described_by_the_folder(folder: Path, opened: Opened, tmp_path: Path) -> None:
    moved = (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert opened(folder, weights=moved).weights.source.label == str(moved)
    torch.save(load_file(moved), tmp_path / "other.pth")
    assert opened(folder, weights=tmp_path / "other.pth").depth == 3


def test_the_command_line_tells_a_refusal_in_one_line(sinder: Callable[..., Any], folder: Path) -> None:
    change(folder, model_type="swin")
    run = sinder("predict-defects", "hf/./folder", cwd=folder.parent)
    assert run.returncode == 65
    assert run.stdout == ""
    assert run.stderr.startswith("sinder: error: cannot use ./folder: SwinLayer of its swin is hierarchical: ")
    assert run.stderr.count("\n") == 1


def test_weights_alone_need_no_transformers(sinder: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    for absent in ("transformers", "huggingface_hub"):
        (tmp_path / "bin" / absent).mkdir(parents=True)
        (tmp_path / "bin" / absent / "__init__.py").write_text("raise ImportError('it is not installed')")
    away = {"PYTHONPATH": str(tmp_path / "bin")}
    run = sinder("predict-defects", f"hf/{folder}", "--format", "json", **away)
    assert (run.returncode, len(json.loads(run.stdout)["blocks"])) == (0, 3)
    photo = tmp_path / "photo.png"
    from PIL import Image

    Image.new("RGB", (64, 64)).save(photo)
    run = sinder("analyze", f"hf/{folder}", "--data", photo, "--workers", "0", **away)
    assert run.returncode == 69
    assert "it is not installed; pip install 'sinder-cli[hf]'" in run.stderr.splitlines()[-1]


def test_listing_imports_neither_torch_nor_transformers(sinder: Callable[..., Any], tmp_path: Path) -> None:
    for absent in ("torch", "transformers", "huggingface_hub"):
        (tmp_path / absent).mkdir()
        (tmp_path / absent / "__init__.py").write_text("raise SystemExit('it was imported')")
    run = sinder("backbones", "--format", "json", PYTHONPATH=str(tmp_path))
    assert run.returncode == 0
    rows = {row["name"]: row for row in json.loads(run.stdout)}
    assert rows["hf/OWNER/NAME"]["revisions"]
    assert rows["hf/OWNER/NAME"]["requires"] == ["transformers", "huggingface_hub"]


def test_an_adapter_of_peft_is_told_by_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(NoInputError, match=r"it is an adapter of peft; put it into its model with merge_and_unload"):
        api.open_model(ModelRequest(f"hf/{tmp_path / 'lora'}"))


@pytest.mark.parametrize("kind", [[], ["clip"], {"clip": 1}])
def test_a_type_that_is_no_text_is_refused(kind: object, folder: Path, opened: Opened) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": kind, "vision_config": config | {"model_type": kind}})
    )
    assert "is not supported" in refusal(opened, folder).why
