"""The page of a repair: one file, true words, nothing loaded, and it opens."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from html_page import Page

from sinder_cli.repair.results import RepairResult
from sinder_cli.report.repair.page import charts, render_repair_page

MakeResult = Callable[..., RepairResult]


def test_the_page_opens_with_a_verdict_in_words(make_result: MakeResult) -> None:
    text = Page(render_repair_page(make_result())).text
    assert "Repaired: tokens above 3 × the median norm 8 → 0 of 128 on 2 images." in text
    assert text.index("Repaired:") < text.index("Before and after")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"before": 0, "changed": 0}, "Nothing to repair: no step changed a weight; no token stands out among 128"),
        ({"before": 4, "after": 4, "changed": 0}, "no step changed a weight; 8 of 128 on 2 images have a norm above"),
        ({"before": 4, "after": 2, "stopped_by": "max_steps"}, "Not finished: 4 tokens left ("),
        ({"before": 4, "after": 2}, "Repaired for the most part: 4 tokens left ("),
        ({"before": 2, "after": 4}, "Not repaired: 8 tokens left ("),
        ({"before": 0}, "Repaired: no token stood out before or after, among 128 on 2 images."),
    ],
)
def test_the_verdict_does_not_claim_more_than_happened(
    make_result: MakeResult, how: dict[str, object], words: str
) -> None:
    assert words in Page(render_repair_page(make_result(**how))).text


def test_nothing_on_the_page_loads_anything(make_result: MakeResult) -> None:
    html = render_repair_page(make_result())
    page = Page(html)
    assert page.addresses() == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert {link["href"] for link in page.all("a")} == {"https://arxiv.org/abs/2407.16826"}
    assert html.count("://") == len(page.all("a"))
    assert "url(" not in html
    assert "@import" not in html
    assert not page.open  # every tag closed


def test_every_picture_is_inside_the_page_and_told_in_words(make_result: MakeResult) -> None:
    pictures = Page(render_repair_page(make_result())).all("img")
    assert len(pictures) == 2 * 5 + 1
    for picture in pictures:
        assert (picture["src"] or "").startswith("data:image/")
        assert len(picture["alt"] or "") > 10


def test_captions_say_how_the_figures_were_made(make_result: MakeResult) -> None:
    text = Page(render_repair_page(make_result())).text
    for words in (
        "residual stream after the last block, before the final norm",
        "one logarithmic scale for every map",
        "before and after together",
        "clipped to its 1st to 99th percentile over both sides",
    ):
        assert words in text


def test_names_cannot_break_out_of_the_page(make_result: MakeResult) -> None:
    name = "\"><img src=x onerror='alert(1)'>&amp;.png"
    page = Page(render_repair_page(make_result(names=[name, "b.png"], model="<script>alert(2)</script>")))
    assert not page.all("script")
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert name in page.text
    assert any(name in (picture["alt"] or "") for picture in page.all("img"))


def test_folders_of_the_images_are_not_told(make_result: MakeResult) -> None:
    assert "somewhere" not in render_repair_page(make_result(names=["/somewhere/private/a.png", "somewhere/b.png"]))


def test_the_page_copes_with_no_steps_no_cls_and_one_image(make_result: MakeResult) -> None:
    page = Page(render_repair_page(make_result(images=1, steps=0, before=0, changed=0, has_cls=False)))
    assert "No step was recorded." in page.text
    assert "no cls token" in page.text
    assert not page.all("svg")


def test_a_missing_metrics_file_leaves_the_charts_out(make_result: MakeResult) -> None:
    result = make_result()
    (result.folder / "metrics.jsonl").unlink()
    assert "No step was recorded." in render_repair_page(result)


def test_a_run_of_clean_steps_has_a_curve_of_clean_images_only() -> None:
    drawn = charts([{"step": 1, "loss": None, "density": 0.5}], 0.75)
    assert [chart.name for chart in drawn] == ["Clean images"]


def test_importing_the_pages_is_cheap() -> None:
    modules = ("repair.page", "repair.card", "analysis.folder", "manual.schema_page")
    code = f"import sys; {'; '.join(f'import sinder_cli.report.{name}' for name in modules)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "matplotlib", "PIL", "jinja2"} & set(loaded)
