"""The model card says what the result holds, in Markdown that renders."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sinder_cli.escaping import printable_lines
from sinder_cli.repairing.folder import RUN_FILES, RunFolder
from sinder_cli.repairing.results import RepairResult
from sinder_cli.report.cards import render_card
from sinder_cli.report.repair.page import render_repair_page
from sinder_cli.report.templates import code_span, table_cell

MakeResult = Callable[..., RepairResult]


def test_the_card_tells_what_was_repaired_how_and_on_what(make_result: MakeResult) -> None:
    card = render_card(make_result())
    for words in (
        "# `demo_vit`, repaired",
        "**Repaired:** outlying tokens at any block 8 → 0 of 128 on 2 images never trained on; largest norm",
        "SINDER: Repairing the Singular Defects of DINOv2",
        "https://arxiv.org/abs/2407.16826",
        "5e" * 32,
        "a7" * 32,
        "| Outlying tokens at any block | 8 | 0 |",
        "| Recipe | sinder |",
        "| State that is kept | after step 12 |",
        "| `max_steps` | `1000` |",
        "70.4 → 55.6 %",
        "sinder export run --to native --out model.pth",
        "title     = {SINDER: Repairing",
    ):
        assert words in card


def test_the_card_tells_where_the_images_come_from(make_result: MakeResult) -> None:
    ways: list[dict[str, Any]] = [{}, {"data": ["/a/photos", "-"], "given": 64}, {"data": ["/a"], "given": 10}]
    drawn, named, mixed = (" ".join(render_card(make_result(**how)).split()) for how in ways)
    assert "64 images, all drawn by the program; labels are not used. The list has the fingerprint `a7a7" in drawn
    assert "64 images; labels are not used. Given: `photos`, `standard input`. The list has" in named
    assert "64 images: 10 given, 54 drawn by the program; labels are not used. Given: `a`. The list" in mixed


def test_card_and_page_tell_no_folder_of_this_machine(make_result: MakeResult) -> None:
    result = make_result(model="hf//home/someone/secret/vit", data=["/home/someone/secret/photos"], given=4)
    source = "/home/someone/secret/vit/model.safetensors, adapted by /home/someone/secret/run/adapter.safetensors"
    result.config["weights"]["source"] = source
    for text in (render_card(result), render_repair_page(result)):
        assert "secret" not in text
        assert "someone" not in text
        assert "model.safetensors, adapted by adapter.safetensors" in text
        assert "hf/vit" in text


def test_no_template_is_left_unrendered(outcome: RepairResult) -> None:
    card = render_card(outcome)
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\{#|None|Undefined", card)
    assert "\n\n\n" not in card


def test_every_row_of_a_table_has_its_heads_columns(make_result: MakeResult) -> None:
    result = make_result(model="a|b`c")
    blocks = re.findall(r"(?:^\|.*\n)+", render_card(result), re.MULTILINE)
    assert len(blocks) >= 5
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}) == 1


def test_only_files_that_are_there_are_listed(make_result: MakeResult) -> None:
    result = make_result()
    card = render_card(result)
    assert "| `metrics.jsonl` |" in card
    assert "| `adapter.safetensors` |" not in card
    assert "| `report.html` | before" in card  # written together with the card
    (result.folder / "adapter.safetensors").touch()
    assert "| `adapter.safetensors` | the changes" in render_card(result)


def test_every_place_in_a_run_directory_is_listed_once(make_result: MakeResult) -> None:
    folder = RunFolder(make_result().folder)
    found = []
    for name in (name for name, kind in vars(RunFolder).items() if isinstance(kind, property)):
        with suppress(OSError):  # properties that read a file which is not there
            found.append(getattr(folder, name))
    paths = [getattr(place, "folder", place) for place in found]  # of checkpoints
    inside = {path.name for path in paths if isinstance(path, Path) and path.parent == folder.path}
    assert inside == {name.rstrip("/") for name in RUN_FILES}


def test_the_documents_list_the_files_of_a_run_directory() -> None:
    readme = (Path(__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")
    for name, meaning in RUN_FILES.items():
        assert f"| `{name}` | {meaning} |" in readme


def test_a_backbone_without_cls_and_a_folder_with_a_space(make_result: MakeResult) -> None:
    result = make_result(has_cls=False)
    card = render_card(replace(result, folder=result.folder.parent / "my run"))
    assert "| no cls token | no cls token |" in card
    assert "sinder export 'my run' --to native" in card


@pytest.mark.parametrize(
    ("text", "span"),
    [("a", "`a`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("a\nb", r"`a\nb`"), ("a``b`", "``` a``b` ```")],
)
def test_a_code_span_holds_any_text(text: str, span: str) -> None:
    assert code_span(text) == span


def test_a_cell_stays_in_its_row() -> None:
    assert table_cell("a|b\n| c") == r"a\|b \| c"


def test_control_characters_in_names_are_escaped_in_markdown(make_result: MakeResult) -> None:
    assert code_span("a\x1b[31m`\u2028b") == r"``a\x1b[31m`\u2028b``"
    assert table_cell("a\x9b|b") == r"a\x9b\|b"
    result = make_result()
    result.config["weights"]["source"] = "vit\x1b[31m.pth"
    card = render_card(result)
    assert r"vit\x1b[31m.pth" in card
    assert printable_lines(card) == card
