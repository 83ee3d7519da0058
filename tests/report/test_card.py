"""The model card says what the result holds, in Markdown that renders."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from sinder_cli.repair.folder import RunFolder
from sinder_cli.repair.results import RepairResult
from sinder_cli.report.pages.templates import code_span, table_cell
from sinder_cli.report.repair.card import FILES, render_card

MakeResult = Callable[..., RepairResult]


def test_the_card_tells_what_was_repaired_how_and_on_what(make_result: MakeResult) -> None:
    card = render_card(make_result())
    for words in (
        "# `demo_vit`, repaired",
        "**Repaired:** tokens above 3 × the median norm 8 → 0 of 128 on 2 images.",
        "SINDER: Repairing the Singular Defects of DINOv2",
        "https://arxiv.org/abs/2407.16826",
        "5e" * 32,
        "a7" * 32,
        "| Outlying tokens | 8 | 0 |",
        "| `max_steps` | `30000` |",
        "sinder export run --to native --out model.pth",
        "title     = {SINDER: Repairing",
    ):
        assert words in card


def test_the_card_tells_where_the_images_come_from(make_result: MakeResult) -> None:
    drawn, named = (" ".join(render_card(make_result(data=data)).split()) for data in ([], ["/a/photos", "-"]))
    assert "64 images, without labels, drawn by the model itself; the list has the fingerprint `a7a7" in drawn
    assert "64 images, without labels, from `/a/photos`, `standard input`; the list has the" in named


def test_no_template_is_left_unrendered(make_result: MakeResult) -> None:
    card = render_card(make_result())
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\{#|None|Undefined", card)
    assert "\n\n\n" not in card


def test_every_row_of_a_table_has_the_columns_of_its_head(make_result: MakeResult) -> None:
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


def test_every_file_of_a_run_has_its_line(make_result: MakeResult) -> None:
    folder = RunFolder(make_result().folder)
    places = (folder.config, folder.metrics, folder.model, folder.adapter, folder.summary, folder.report, folder.card)
    assert {place.name for place in places} <= set(FILES)


def test_a_backbone_without_cls_and_a_folder_with_a_space(make_result: MakeResult) -> None:
    result = make_result(has_cls=False)
    card = render_card(replace(result, folder=result.folder.parent / "my run"))
    assert "| no cls token | no cls token |" in card
    assert "sinder export 'my run' --to native" in card


@pytest.mark.parametrize(
    ("text", "span"),
    [("a", "`a`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("a\nb", "`a b`"), ("a``b`", "``` a``b` ```")],
)
def test_a_code_span_holds_any_text(text: str, span: str) -> None:
    assert code_span(text) == span


def test_a_cell_stays_in_its_row() -> None:
    assert table_cell("a|b\n| c") == r"a\|b \| c"
