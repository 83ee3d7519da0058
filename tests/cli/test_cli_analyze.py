"""`sinder analyze`: what a notebook with forward hooks would find, and pipes that behave."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sinder_plugins.dinov2.module import VisionTransformer
from torch import Tensor

from sinder_cli import attention_kernel

Sinder = Callable[..., subprocess.CompletedProcess[str]]
CUSTOM = "dinov2_custom"
SIDE = 126  # 9 × 9 patches


def hooked_tokens(weights: Path, photographs: Path) -> list[Tensor]:
    """The output of each block, `[images, 1 + 4 + 81, N]`, as forward hooks on the module see it."""
    from sinder_plugins.dinov2.config import Config

    module = VisionTransformer(Config(128, 3, 512, grid=9, registers=4), 2, attention_kernel("eager"))
    module.load_state_dict(torch.load(weights, weights_only=True))
    seen: list[Tensor] = []
    for block in module.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    arrays = []
    for path in sorted(photographs.iterdir()):
        image = Image.open(path).convert("RGB")
        scale = SIDE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        arrays.append(np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float64) / 255)
    pixels = (np.stack(arrays) - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.no_grad():
        module(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))
    return seen


def test_the_numbers_are_those_of_forward_hooks_on_the_module(
    sinder: Sinder, with_registers: Path, photographs: Path
) -> None:
    run = sinder("analyze", CUSTOM, "--weights", with_registers, photographs, "--batch-size", "4", "--resize", "square")
    assert run.returncode == 0, run.stderr
    document = analysed(run)
    assert (document["images"], document["grid"], document["skipped"]) == (6, [9, 9], {})
    assert "before the final norm" in document["tapped"]
    expected = hooked_tokens(with_registers, photographs)
    assert len(document["blocks"]) == len(expected) == 3
    for row, tokens in zip(document["blocks"], expected, strict=True):
        norms = tokens.norm(dim=-1)
        patches = norms[:, 5:]
        summed_up(row["patch_norm"], patches)
        summed_up(row["cls_norm"], norms[:, 0])
        summed_up(row["register_norm"], norms[:, 1:5])
        outliers = patches > 3 * patches.median(dim=1, keepdim=True).values
        assert row["marked"]["outlying"]["tokens"] == int(outliers.sum())


def summed_up(found: dict[str, float], values: Tensor) -> None:
    """A distribution of the document against numpy."""
    numbers = values.double().numpy().ravel()
    assert found["count"] == len(numbers)
    assert found["mean"] == pytest.approx(numbers.mean(), rel=1e-4)
    assert found["min"] == pytest.approx(numbers.min(), rel=1e-4)
    assert found["max"] == pytest.approx(numbers.max(), rel=1e-4)
    for name, share in (("p01", 0.01), ("median", 0.5), ("p99", 0.99)):
        assert found[name] == pytest.approx(np.quantile(numbers, share), rel=5e-3)


def test_registers_have_a_column_of_their_own(sinder: Sinder, with_registers: Path, photographs: Path) -> None:
    arguments = ("analyze", CUSTOM, "--weights", with_registers, "--data", photographs / "coffee.png")
    run = sinder(*arguments, "--format", "table")
    assert run.returncode == 0, run.stderr
    assert "register" in run.stdout
    assert "1 image; norms before the final norm" in run.stdout
    assert max(map(len, run.stdout.splitlines()[:6])) <= 80
    assert "\x1b" not in run.stdout + run.stderr
    assert "…" not in run.stdout


def test_find_pipes_paths_in_and_json_comes_out(
    with_registers: Path, photographs: Path, environment: dict[str, str]
) -> None:
    python = shlex.quote(sys.executable)
    line = (
        f"set -o pipefail; find {shlex.quote(str(photographs))} -name '*.png'"
        f" | {python} -m sinder_cli analyze {CUSTOM} --weights {shlex.quote(str(with_registers))}"
        f" --data - --format json"
        f" | {python} -m json.tool"
    )
    run = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, timeout=300, check=True)
    assert json.loads(run.stdout)["images"] == len(list(photographs.glob("*.png"))) == 4


@pytest.mark.parametrize(
    "arguments",
    [["backbones"], ["predict-defects", CUSTOM, "-o", "-"], ["--help"]],
    ids=["a document", "binary", "help"],
)
def test_a_reader_who_has_left_ends_it_quietly(arguments: list[str], small: Path, environment: dict[str, str]) -> None:
    weights = ["--weights", str(small)] if CUSTOM in arguments else []
    command = [sys.executable, "-m", "sinder_cli", *arguments, *weights]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == -13  # of SIGPIPE: 141 in a shell
    assert "Traceback" not in said
    assert "error" not in said
    assert "Exception ignored" not in said


def test_a_shell_sees_141_where_the_reader_has_left(environment: dict[str, str]) -> None:
    sinder = f"{shlex.quote(sys.executable)} -m sinder_cli"
    line = f'{sinder} backbones --format table | (exec <&-; sleep 2); echo "${{PIPESTATUS[0]}}"'
    run = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, timeout=300, check=True)
    assert (run.stdout, run.stderr) == ("141\n", "")


def analysed(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run.stdout)
    return document


def test_a_corrupt_image_is_skipped_named_and_counted(
    sinder: Sinder, with_registers: Path, photographs: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((photographs / "coffee.png").read_bytes()[:40_000])
    places = (photographs / "rocket.jpg", broken)
    run = sinder("analyze", CUSTOM, "--weights", with_registers, *places, "--format", "json")
    assert run.returncode == 0, run.stderr
    document = analysed(run)
    assert document["images"] == 1
    assert list(document["skipped"]) == [str(broken)]
    assert f"sinder: warning: skipped {broken}" in run.stderr


def test_the_verdict_on_the_demo_and_on_its_twin(sinder: Sinder) -> None:
    run = sinder("analyze", "demo_vit", "--limit", "4", "--fail-on-defects")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("sinder: error: demo_vit fails: defects from block 5")
    found = analysed(run)
    assert found["verdict"]["kind"] == "defects"
    assert found["verdict"]["first_block"] == 5
    clean = sinder("analyze", "demo_vit_clean", "--limit", "4", "--fail-on-defects")
    assert clean.returncode == 0, clean.stderr
    assert analysed(clean)["verdict"]["kind"] == "none"
    assert analysed(clean)["verdict"]["sentence"].startswith("healthy: no token is outlying in any block")
    assert analysed(clean)["inpainting"]["gain"] == "healthy"
    assert analysed(clean)["inpainting"]["by_image"] == []
    assert found["inpainting"]["gain"] == "features"
    assert found["inpainting"]["images"] == len(found["inpainting"]["by_image"]) == 4


def test_the_table_has_a_verdict_a_sparkline_and_the_files(sinder: Sinder, tmp_path: Path) -> None:
    run = sinder(
        "analyze", "demo_vit", "--limit", "2", "--figures", "1", "--out", tmp_path / "look", "--format", "table"
    )
    assert run.returncode == 0, run.stderr
    assert "▁▁▁▁▁███████" in run.stdout
    assert "demo_vit: defects from block 5" in run.stdout
    assert "Without its outlying tokens (18 in 2 of 2 images) cls" in run.stdout
    assert f"report: {tmp_path / 'look' / 'report.html'}" in run.stdout


def test_the_folder_holds_what_standard_output_says_and_more(sinder: Sinder, tmp_path: Path) -> None:
    folder = tmp_path / "look"
    run = sinder("analyze", "demo_vit", "--limit", "3", "--figures", "2", "--blocks", "4,5", "--out", folder)
    assert run.returncode == 0, run.stderr
    document = analysed(run)
    assert run.stdout == (folder / "report.json").read_text("utf-8")
    assert document["schema_version"] == 2
    assert len(list(folder.glob("figures/*-inpainted.png"))) == 2
    listed = {figure["file"] for figure in document["figures"]}
    assert listed == {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert all(figure["caption"] for figure in document["figures"])
    directions = load_file(folder / "directions.safetensors")
    assert directions["observed"].shape == directions["predicted.cumulative"].shape == (12, 192)
    assert directions["observed"].norm(dim=1).tolist() == pytest.approx([0.0] * 5 + [1.0] * 7, abs=1e-5)
    cosines = (directions["observed"] * directions["predicted.cumulative"]).sum(dim=1)[5:]
    assert cosines.abs().min() > np.cos(np.radians(4))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    for words in (
        "What a repair could change",
        "Caution.",
        "70.4",
        "test the repaired",
        "Against the inpainted original",
    ):
        assert words in page, words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["look"]


def test_a_dash_prints_the_document_and_writes_nothing(sinder: Sinder, tmp_path: Path) -> None:
    run = sinder("analyze", "demo_vit_clean", "--limit", "2", "-o", "-", "--format", "table", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert analysed(run)["images"] == 2
    assert list(tmp_path.iterdir()) == []


def test_an_original_is_compared_with_its_twin_and_clamped_self(sinder: Sinder) -> None:
    twin = sinder("analyze", "demo_vit", "--compare", "demo_vit_clean", "--limit", "2")
    assert twin.returncode == 0, twin.stderr
    clamped = sinder("analyze", "demo_vit", "--clamp", "3", "--limit", "2")
    assert clamped.returncode == 0, clamped.stderr
    for run in (twin, clamped):
        document = analysed(run)
        assert document["verdict"]["kind"] == "defects"
        assert document["other"]["verdict"]["kind"] == "none"
        assert [pair["block"] for pair in document["comparison"]] == list(range(12))
        assert document["comparison"][4]["patch_cosine"]["median"] == pytest.approx(1, abs=1e-3)
        assert 0.9 < document["comparison"][11]["cls_cosine"]["median"] < 1
        assert document["comparison"][11]["patch_cosine"]["min"] < 0.5
    table = sinder(
        "analyze", "demo_vit", "--compare", "demo_vit_clean", "--limit", "1", "--format", "table", COLUMNS="80"
    )
    assert "Against demo_vit_clean" in table.stdout


def test_the_inpainted_pass_is_a_second_model_and_gives_features(sinder: Sinder, tmp_path: Path) -> None:
    options = ("--method", "inpaint", "--limit", "2", "--features", tmp_path / "features", "--format", "table")
    run = sinder("analyze", "demo_vit", *options)
    assert run.returncode == 0, run.stderr
    assert "Against demo_vit, inpainted" in run.stdout
    assert f"features: {tmp_path / 'features'}, 2 files" in run.stdout
    files = sorted((tmp_path / "features").iterdir())
    assert [path.suffix for path in files] == [".safetensors"] * 2
    found = load_file(files[0])
    assert (found["patches"].shape, found["cls"].shape) == ((20, 20, 192), (192,))
    again = sinder("analyze", "demo_vit", *options)
    assert again.returncode == 73
    assert "it is not empty; choose another --features" in again.stderr


def test_an_inpainted_model_is_compared_with_no_other(sinder: Sinder) -> None:
    run = sinder("analyze", "demo_vit", "--method", "inpaint", "--compare", "demo_vit_clean")
    assert run.returncode == 2
    assert "one is named, one is inpainted" in run.stderr
    run = sinder("analyze", "demo_vit", "--method", "inpaint", "--clamp", "3")
    assert run.returncode == 2
    assert "one comparison at a time" in run.stderr


def test_the_second_pass_can_be_left_out(sinder: Sinder) -> None:
    run = sinder("analyze", "demo_vit", "--limit", "1", "--no-inpaint")
    assert run.returncode == 0, run.stderr
    assert analysed(run)["inpainting"] is None
    assert analysed(run)["verdict"]["kind"] == "defects"


def test_the_norm_factor_says_which_tokens_are_outlying(sinder: Sinder) -> None:
    run = sinder("analyze", "demo_vit", "--limit", "1", "--norm-factor", "1000", "--format", "table", COLUMNS="200")
    assert run.returncode == 0, run.stderr
    assert "> 1000 ×" in run.stdout
    assert "healthy: no token is outlying in any block; a repair would train nothing." in run.stdout


@pytest.mark.parametrize("resize", ["short", "square", "none"])
def test_images_keep_their_shape_unless_a_square_is_asked_for(
    resize: str, sinder: Sinder, with_registers: Path, photographs: Path
) -> None:
    image = photographs / "chelsea.png"  # 451 × 300
    run = sinder("analyze", CUSTOM, "--weights", with_registers, image, "--resize", resize, "--format", "json")
    assert run.returncode == 0, run.stderr
    patches = {"short": 9 * (451 * 126 // 300 // 14), "square": 81, "none": (451 // 14) * (300 // 14)}
    assert analysed(run)["blocks"][0]["patch_norm"]["count"] == patches[resize]


def test_a_limit_draws_images_by_the_seed(sinder: Sinder, with_registers: Path, photographs: Path) -> None:
    def medians(seed: str) -> list[float]:
        options = ("--limit", "2", "--seed", seed, "--workers", "0")
        run = sinder("analyze", CUSTOM, "--weights", with_registers, photographs, *options)
        assert analysed(run)["images"] == 2
        return [block["patch_norm"]["median"] for block in analysed(run)["blocks"]]

    assert medians("0") == medians("0")
    assert len({tuple(medians(seed)) for seed in "0123"}) > 1


def test_the_head_of_a_document_ends_the_analysis_quietly(environment: dict[str, str]) -> None:
    line = f"{shlex.quote(sys.executable)} -m sinder_cli analyze demo_vit_clean --limit 1 --format json | head -1"
    run = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, timeout=300, check=True)
    assert run.stdout == "{\n"
    assert "Traceback" not in run.stderr
    assert "error" not in run.stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(
    environment: dict[str, str], with_registers: Path, photographs: Path, tmp_path: Path
) -> None:
    def peak(count: int) -> float:
        """MB of the process at its largest, over so many links to photographs."""
        folder = tmp_path / str(count)
        folder.mkdir()
        sources = sorted(photographs.iterdir())
        for index in range(count):
            source = sources[index % len(sources)]
            (folder / f"{index:05d}{source.suffix}").symlink_to(source)
        script = (
            "import resource, sys; from sinder_cli.cli.main import main\n"
            "try: main(sys.argv[1:])\n"
            "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
        )
        options = ["--image-size", "70", "--resize", "square", "--batch-size", "8"]
        command = [sys.executable, "-c", script, "analyze", CUSTOM, "--weights", str(with_registers), *options]
        run = subprocess.run([*command, str(folder)], capture_output=True, text=True, env=environment, check=True)
        assert json.loads(run.stdout)["images"] == count
        return int(run.stderr.splitlines()[-1]) / 1024

    assert peak(1000) < peak(50) + 30


def test_a_corrupt_image_with_an_undecodable_name_is_named_nonetheless(
    sinder: Sinder, with_registers: Path, photographs: Path, tmp_path: Path
) -> None:
    odd = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png")
    Path(odd).write_bytes(b"no image")
    places = (photographs / "rocket.jpg", odd)
    run = sinder("analyze", CUSTOM, "--weights", with_registers, *places, "--format", "json")
    assert run.returncode == 0, run.stderr
    assert list(analysed(run)["skipped"]) == [odd]
    assert r"caf\udce9.png" in run.stderr


def test_figures_are_drawn_of_images_that_could_be_decoded(
    sinder: Sinder, with_registers: Path, photographs: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    for index, path in enumerate(sorted(photographs.iterdir())):
        (tmp_path / "data" / f"{index}{path.suffix}").symlink_to(path)
        (tmp_path / "data" / f"{index}b.png").write_bytes(b"no image")
    folder = tmp_path / "look"
    options = ("--weights", with_registers, "--figures", "4", "--out", folder)
    run = sinder("analyze", CUSTOM, tmp_path / "data", *options)
    assert run.returncode == 0, run.stderr
    assert len(list(folder.glob("figures/*-norm.png"))) == 4
    assert len(analysed(run)["skipped"]) == 6


def test_settings_are_told_as_they_were_resolved(sinder: Sinder, with_registers: Path, photographs: Path) -> None:
    place = photographs / "rocket.jpg"
    run = sinder("analyze", CUSTOM, "--weights", with_registers, place, "--device", "auto", "--format", "json")
    settings = analysed(run)["settings"]
    assert (settings["image_size"], settings["blocks"]) == (SIDE, [0, 1, 2])
    assert settings["device"] in ("cpu", "cuda")
    assert "workers" not in settings  # they change nothing, and two runs are to print the same
    assert len(analysed(run)["fingerprint"]) == 64


def test_tokens_that_are_not_finite_are_no_clean_bill(
    sinder: Sinder, with_registers: Path, photographs: Path, tmp_path: Path
) -> None:
    state = torch.load(with_registers, weights_only=True)
    state["blocks.1.attn.proj.bias"][7] = float("nan")  # of a bias, which no direction depends on
    torch.save(state, tmp_path / "broken.pth")
    options = ("--weights", tmp_path / "broken.pth", "--fail-on-defects", "--format", "table")
    run = sinder("analyze", CUSTOM, "--data", photographs / "rocket.jpg", *options)
    assert run.returncode == 1
    assert "tokens that are not finite from block 1" in run.stdout
    assert "2 blocks without a finite token" in run.stdout


def test_clamping_that_changes_nothing_is_reported(sinder: Sinder, with_registers: Path, photographs: Path) -> None:
    run = sinder("analyze", CUSTOM, "--weights", with_registers, photographs / "rocket.jpg", "--clamp", "999")
    assert run.returncode == 0, run.stderr
    assert "sinder: warning: clamping to singular value 999 changes nothing" in run.stderr


def test_out_with_a_json_file_name_writes_the_document_alone(sinder: Sinder, tmp_path: Path) -> None:
    run = sinder("analyze", "demo_vit", "--limit", "1", "-o", tmp_path / "x.json")
    assert run.returncode == 0, run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == json.loads(run.stdout)


def test_a_json_file_in_no_folder_is_told_before_work(sinder: Sinder, tmp_path: Path) -> None:
    run = sinder("analyze", "demo_vit", "-o", tmp_path / "nowhere" / "x.json")
    assert run.returncode == 73
    assert run.stderr.count("\n") == 1
    assert "there is no folder" in run.stderr


def test_an_existing_folder_named_like_a_file_is_used(sinder: Sinder, tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    run = sinder("analyze", "demo_vit", "--limit", "1", "--figures", "0", "-o", tmp_path / "x.json")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "x.json" / "report.json").is_file()


def test_odd_names_and_lists_go_from_shell_to_document(
    sinder: Sinder, with_registers: Path, photographs: Path, tmp_path: Path
) -> None:
    names = ["new\nline.png", "esc\x1b[31m.png", "u\u2028x.png", "v\u0085.png"]
    for name in names:
        shutil.copy(photographs / "rocket.jpg", tmp_path / name)
    (tmp_path / "gone\x1b.png").symlink_to(tmp_path / "nowhere")
    listed = "".join(f"{tmp_path / name}\0" for name in [*names, "missing\n.png"])
    (tmp_path / "list.txt").write_bytes(f"{tmp_path / names[2]}\r\n".encode("utf-16"))
    model = ("analyze", CUSTOM, "--weights", with_registers, "--resize", "square")
    for arguments, stdin, images in (("-", listed, 4), (tmp_path / "list.txt", "", 1), (tmp_path, "", 4)):
        run = sinder(*model, "--data", arguments, stdin=stdin)
        assert run.returncode == 0, run.stderr
        assert analysed(run)["images"] == images
        assert "\x1b" not in run.stdout + run.stderr
        assert all(line.startswith("sinder: ") for line in run.stderr.splitlines())
        if stdin:
            assert list(analysed(run)["skipped"]) == [str(tmp_path / "missing\n.png")]
            assert rf"skipped {tmp_path}/missing\n.png: " in run.stderr
    assert r"passed over: 1 dangling link (gone\x1b.png), 1 text file (list.txt)" in run.stderr
