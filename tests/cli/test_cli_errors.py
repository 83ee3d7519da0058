"""Whatever goes wrong: one line that says what, why and what to do, an exit code, and nothing left behind."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

Sinder = Callable[..., subprocess.CompletedProcess[str]]
ERROR = re.compile(r"sinder: error: [^:]+.*: .+; .+")
CUSTOM = "dinov2_custom"


class Case(NamedTuple):
    """A command line with {places}, its exit code, and words that the message must have; {model} is a good one."""

    arguments: str
    code: int
    word: str

    def line(self, places: dict[str, Path]) -> list[str]:
        """The arguments with every place filled in."""
        parts = self.arguments.replace("{model}", f"{CUSTOM} --weights {{small}}").split()
        return [part.format(**places) for part in parts]


CASES = {
    "a misspelt model": Case("predict-defects demo_vitt", 2, "did you mean demo_vit or demo_vit_clean"),
    "a misspelt plugin": Case("predict-defects dinv2_vits14", 2, "did you mean dinov2_vits14"),
    "a misspelt official model": Case("analyze dinov2_vits41 --data {photos}", 2, "dinov2_vits14"),
    "an unknown command": Case("mend demo_vit", 2, "mend"),
    "an unknown option": Case("repair demo_vit --steps 3", 2, "--steps"),
    "no model": Case("repair", 2, "MODEL"),
    "a value that is no number": Case("repair demo_vit --batch-size many", 2, "it must be a whole number, not 'many'"),
    "a value out of range": Case("repair demo_vit --out {new} --lr 0", 2, "it must be above 0, not 0"),
    "an infinite value": Case("repair demo_vit --out {new} --lr inf", 2, "it must be a finite number"),
    "a learning rate that spoils all": Case(
        "repair demo_vit --out {new} --lr 100", 2, "it must be 10 or less, not 100"
    ),
    "a recipe that is none": Case("repair demo_vit --out {new} --recipe mine", 2, "'sinder', 'polyak' or 'paper'"),
    "a log of no kind": Case("repair demo_vit --out {new} --log foo", 2, "'log': it must be 'tensorboard' or 'wandb'"),
    "a number that no computer counts": Case(
        "repair demo_vit --batch-size 9999999999999999999", 2, "1000000000 or less"
    ),
    "a report under the name of a page": Case("analyze demo_vit -o {new}.html", 2, "give --out"),
    "a value that is no choice": Case("analyze demo_vit --kernel 4", 2, "it must be 3 or 5, not 4"),
    "an unknown stage": Case("predict-defects demo_vit --stage last", 2, "--stage"),
    "a device of no kind": Case("analyze demo_vit --device tpu", 2, "cuda:N or mps, not 'tpu'"),
    "an unknown export format": Case("export demo_vit --to tflite --out {new}.pth", 2, "native"),
    "an unknown suffix to export": Case("export demo_vit --to native --out {new}.zip", 2, ".safetensors"),
    "an image size of too few patches": Case("analyze {model} --data {photos} --image-size 60", 2, "--image-size 70"),
    "a missing folder": Case("analyze demo_vit --data {new}", 66, "no such file"),
    "a missing folder, to repair": Case("repair demo_vit --data {new} --out {other}", 66, "no such file"),
    "an empty folder": Case("repair demo_vit --data {empty} --out {new}", 66, "no images in"),
    "nothing on standard input": Case("analyze demo_vit --data -", 66, "no images in"),
    "only corrupt images": Case("repair {model} --data {corrupt} --out {new}", 65, "no image could be decoded"),
    "only corrupt images, to analyze": Case("analyze {model} --data {corrupt}", 65, "no image could be decoded"),
    "missing weights": Case("predict-defects dinov2_vits14 --weights {new}.pth", 66, "no such file"),
    "a comparison with another shape": Case(
        "analyze dinov2_custom --weights {small} --compare demo_vit {photos}", 2, "their width differs"
    ),
    "a comparison with two models": Case("analyze demo_vit --compare demo_vit_clean --clamp 3", 2, "leave one of them"),
    "weights of no second model": Case("analyze demo_vit --compare-weights {small}", 2, "name it with --compare"),
    "a comparison with no run": Case("analyze demo_vit --compare {empty}", 66, "no run directory"),
    "a size for images that keep theirs": Case("analyze demo_vit --resize none --image-size 70", 2, "no image_size"),
    "an unknown way of resizing": Case("analyze demo_vit --resize long", 2, "'short', 'square' or 'none'"),
    "blocks that are no numbers": Case("analyze demo_vit --blocks 3,x", 2, "blocks"),
    "blocks of which there is none": Case("analyze demo_vit --blocks ,", 2, "'blocks': give numbers"),
    "blocks that are not there": Case("analyze demo_vit --blocks 3,12", 2, "0 to 11"),
    "a negative number of figures": Case("analyze demo_vit --figures -1", 2, "'figures': give 0 or more"),
    "a report under a file": Case("analyze demo_vit --out {readme}/look", 73, "cannot create"),
    "a report into a folder in use": Case("analyze demo_vit --out {photos}", 73, "not empty"),
    "missing settings": Case("analyze demo_vit --config {new}.toml", 66, "--config"),
    "a truncated .pth": Case("predict-defects dinov2_custom --weights {truncated}.pth", 65, "fetch it again"),
    "a truncated .safetensors": Case(
        "predict-defects dinov2_custom --weights {truncated}.safetensors", 65, "fetch it again"
    ),
    "another model's checkpoint": Case("predict-defects dinov2_vits14 --weights {small}", 65, "dinov2_custom takes"),
    "no checkpoint of a transformer": Case("predict-defects dinov2_custom --weights {foreign}", 65, "patch_embed"),
    "weights of a suffix nobody knows": Case(
        "predict-defects dinov2_custom --weights {readme}", 65, "neither a safetensors"
    ),
    "a run directory under a file": Case("repair demo_vit --out {readme}/run", 73, "cannot create"),
    "a run directory that is a file": Case("repair demo_vit --out {readme}", 73, "cannot create"),
    "directions under a file": Case("predict-defects demo_vit -o {readme}/nu.safetensors", 73, "cannot create"),
    "an export into no folder": Case("export demo_vit --to native --out {new}/a.pth", 73, "there is no folder"),
    "an export onto a folder": Case("export demo_vit --to native --out {folder}.pth", 73, "it is a folder"),
    "prediction on no device": Case("predict-defects demo_vit --device gpu", 2, "it must be auto, cpu, cuda"),
    "prediction on a missing device": Case("predict-defects demo_vit --device cuda:99", 69, "--device cpu"),
    "xformers where there is none": Case("repair demo_vit --attention xformers --out {new}", 69, "--attention sdpa"),
    "directions onto a device": Case("predict-defects demo_vit -o /dev/null", 73, "it is a device"),
    "a new run directory for an unknown model": Case("repair demo_vitt --out {new}/a/b", 2, "demo_vit"),
    "a run that is not there": Case("export {new}/run --to native --out {new}.pth", 66, "no run directory"),
    "a folder that is no run": Case("export {empty} --to native --out {new}.pth", 66, "no run directory"),
    "weights for a run": Case(
        "export {unfinished} --weights {small} --to native --out {new}.pth", 2, "its own weights"
    ),
    "a run without an end": Case("export {unfinished} --to native --out {new}.pth", 66, "did not finish"),
    "a run whose config is no JSON": Case("export {spoilt} --to native --out {new}.pth", 65, "config.json"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, photographs: Path, small: Path) -> dict[str, Path]:
    """What the command lines name."""
    root = tmp_path_factory.mktemp("places")
    for folder in ("empty", "corrupt", "unfinished", "spoilt", "folder.pth"):
        (root / folder).mkdir()
    (root / "empty" / "notes.txt").write_text("no image")
    (root / "corrupt" / "a.jpg").write_bytes((photographs / "rocket.jpg").read_bytes()[:5000])
    (root / "corrupt" / "b.png").write_text("no image either")
    (root / "unfinished" / "config.json").write_text('{"model": "demo_vit"}')
    (root / "spoilt" / "config.json").write_text("{")
    (root / "readme.txt").write_text("a regular file")
    (root / "truncated.safetensors").write_bytes(small.read_bytes()[:-1000])
    torch.save({"a": torch.zeros(1000)}, root / "whole.pth")
    (root / "truncated.pth").write_bytes((root / "whole.pth").read_bytes()[:-300])
    save_file({"conv1.weight": torch.zeros(8, 3, 7, 7)}, root / "foreign.safetensors")
    listed = tmp_path_factory.mktemp("listing") / "before.txt"
    listed.write_text("\n".join(map(str, everything_in(root))))
    names = {"empty", "corrupt", "unfinished", "spoilt", "truncated", "folder", "new", "other"}
    return {name: root / name for name in names} | {
        "photos": photographs,
        "small": small,
        "readme": root / "readme.txt",
        "before": listed,
        "foreign": root / "foreign.safetensors",
    }


def require_one_line(run: subprocess.CompletedProcess[str], code: int, word: str) -> None:
    """Exit code, one well-formed error line as the last of standard error, and nothing on standard output."""
    errors = [line for line in run.stderr.splitlines() if line.startswith("sinder: error")]
    assert run.returncode == code, run.stderr
    assert len(errors) == 1, run.stderr
    assert ERROR.fullmatch(errors[0]), errors[0]
    assert word in errors[0]
    assert run.stderr.splitlines()[-1] == errors[0]
    assert all(line.startswith("sinder: ") for line in run.stderr.splitlines()), run.stderr
    assert run.stdout == ""


def everything_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.fixture(scope="module")
def endings(sinder: Sinder, places: dict[str, Path]) -> dict[str, subprocess.CompletedProcess[str]]:
    """How each case ended; they run side by side, since most of their time goes into starting Python."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        own = [places | {"new": places["new"].with_name(f"new{number}")} for number in range(len(CASES))]
        runs = pool.map(lambda case, given: sinder(*case.line(given)), CASES.values(), own)
        return dict(zip(CASES, runs, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_and_an_exit_code(
    name: str, endings: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    require_one_line(endings[name], CASES[name].code, CASES[name].word)


def test_no_mistake_leaves_a_file_or_a_folder_behind(places: dict[str, Path], request: pytest.FixtureRequest) -> None:
    before = places["before"].read_text().splitlines()
    request.getfixturevalue("endings")
    assert [str(path) for path in everything_in(places["new"].parent)] == before


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_checkpoint_of_another_pickle_protocol_brings_out_no_warning(
    protocol: int, sinder: Sinder, tmp_path: Path
) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "new.pth", pickle_protocol=protocol)
    run = sinder("predict-defects", CUSTOM, "--weights", tmp_path / "new.pth")
    require_one_line(run, 65, "new.pth")
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_reported(sinder: Sinder, tmp_path: Path) -> None:
    run = sinder("repair", "demo_vit", "--device", "cuda", "--out", tmp_path / "run")
    require_one_line(run, 69, "--device cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    ["repair demo_vit --out {occupied}", "repair dinov2_vitg14 --data {photos} --out {readme}/run"],
    ids=["a folder in use", "a place where none can be"],
)
def test_a_useless_output_is_told_before_any_work(
    arguments: str, sinder: Sinder, places: dict[str, Path], tmp_path: Path
) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").write_text("mine")
    run = sinder(*Case(arguments, 73, "").line(places | {"occupied": occupied}))
    require_one_line(run, 73, "cannot create")
    assert len(run.stderr.splitlines()) == 1  # no checkpoint was opened, none was downloaded
    assert [path.name for path in occupied.iterdir()] == ["mine.txt"]


def test_missing_images_are_told_before_a_checkpoint_is_fetched(sinder: Sinder, places: dict[str, Path]) -> None:
    for command in ("analyze", "repair"):
        run = sinder(command, "dinov2_vitg14", "--data", places["new"])
        require_one_line(run, 66, "no such file")


def test_debug_shows_the_traceback_as_well(sinder: Sinder, tmp_path: Path) -> None:
    run = sinder("--debug", "analyze", "demo_vit", "--data", tmp_path / "nowhere")
    assert run.returncode == 66
    assert "Traceback (most recent call last)" in run.stderr
    assert "NoInputError" in run.stderr
    assert run.stderr.splitlines()[-1].startswith("sinder: error: cannot read images")


def limited(arguments: list[str], environment: dict[str, str], size: int) -> subprocess.CompletedProcess[str]:
    """Run where no file may grow over `size` bytes: writing fails as it does on a full disk."""
    return subprocess.run(
        [sys.executable, "-m", "sinder_cli", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_disk_that_fills_up_during_an_export_leaves_nothing(
    suffix: str, environment: dict[str, str], small: Path, tmp_path: Path
) -> None:
    arguments = ["export", CUSTOM, "--weights", str(small), "--to", "native", "--out", str(tmp_path / f"out{suffix}")]
    run = limited(arguments, environment, 1 << 20)
    require_one_line(run, 74, "cannot write")
    assert everything_in(tmp_path) == []


def test_a_full_disk_during_a_repair_leaves_no_half_model(
    environment: dict[str, str], small: Path, photographs: Path, tmp_path: Path
) -> None:
    arguments = ["repair", CUSTOM, "--weights", str(small), "--data", str(photographs), "--out", str(tmp_path / "run")]
    run = limited([*arguments, "--max-steps", "1", "--eval-images", "1"], environment, 1 << 20)
    require_one_line(run, 74, "cannot write")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    begun = {"config.json", "images.jsonl", "outliers.json", "metrics.jsonl", "checkpoints"}
    assert names == begun  # no model, and nothing temporary


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", ["backbones", "predict-defects {model} -o -"])
def test_a_full_disk_behind_standard_output_is_an_error(
    arguments: str, places: dict[str, Path], environment: dict[str, str]
) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "sinder_cli", *Case(arguments, 74, "").line(places)]
        run = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=300, check=False
        )
    assert run.returncode == 74
    assert "No space left on device" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
    assert "Exception ignored" not in run.stderr
