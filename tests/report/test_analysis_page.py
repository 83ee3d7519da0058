"""The page of an analysis: it opens with the verdict, says what every figure is, and lets nothing in or out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from html_page import Page
from made_analysis import Made

from sinder_cli.analysis.records import VerdictKind
from sinder_cli.escaping import printable_lines
from sinder_cli.events import silent
from sinder_cli.report.analysis import facts
from sinder_cli.report.analysis.facts import COLOUR_OF
from sinder_cli.report.analysis.page import write_analysis


def page_of(made: Made, folder: Path) -> tuple[str, Page]:
    write_analysis(folder / "out", made.result(), silent)
    html = (folder / "out" / "report.html").read_text("utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    settings = {"exclude_masked": True, "min_gap": 1.3}
    return page_of(
        Made(compared=True, skipped={"c.png": "truncated"}, settings=settings), tmp_path_factory.mktemp("two")
    )


def test_the_page_opens_with_the_verdict(tmp_path: Path) -> None:
    made = Made()
    verdict = made.result().analysis.verdict
    _, page = page_of(made, tmp_path)
    assert verdict.kind == "defects"
    opening = page.text[: page.text.index("In numbers")]
    assert opening.endswith(f"sinder analyze of demo_vit demo_vit: {verdict.sentence} {verdict.confidence} ")


def test_the_contents_come_in_this_order(compared: tuple[str, Page]) -> None:
    _, page = compared
    headings = (
        "In numbers",
        "Block by block",
        "Both sides, block by block",
        "Norms",
        "Angles to the predicted direction",
        "Positions",
        "Image by image",
        "How it was run",
        "Where it comes from",
        "Images that were skipped",
        "The method is that of",
    )
    places = [page.text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert page.text.index("c.png") > places[-2]


def test_nothing_is_loaded_and_every_tag_is_closed(compared: tuple[str, Page]) -> None:
    require_closed(*compared)


def test_a_page_without_pictures_is_as_closed(tmp_path: Path) -> None:
    html, page = page_of(Made(depth=1, has_cls=False, first=None, drawn=0), tmp_path)
    require_closed(html, page)
    assert "No image was drawn." in page.text


def require_closed(html: str, page: Page) -> None:
    assert page.addresses() == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert html.count("://") == len(page.all("a")) == 1
    assert "@import" not in html
    assert not page.open
    policy = [meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert [meta["content"] for meta in policy] == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_drawings_take_their_colours_from_the_page(compared: tuple[str, Page]) -> None:
    html, page = compared
    drawings = html[html.index("<svg") : html.rindex("</svg>")]
    assert "var(--line)" in drawings
    for colour in ("#2b5c8a", "#1d1c1a", "#5f5b55", "#c2500f"):
        assert colour not in drawings
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {use["xlink:href"] for use in page.all("use")} <= {f"#{name}" for name in ids}


def test_every_picture_is_told_in_words(compared: tuple[str, Page]) -> None:
    _, page = compared
    pictures = page.all("img")
    assert len(pictures) > 2 * (2 + 2 * (3 + 4 + 4) + 4)
    assert all(len(picture["alt"] or "") > 10 for picture in pictures)
    assert all(len(drawing["aria-label"] or "") > 10 for drawing in page.all("svg"))


def test_captions_say_how_the_figures_were_made(compared: tuple[str, Page]) -> None:
    _, page = compared
    for words in (
        "From 3 images, residual stream after each block, before the final norm.",
        "one basis for all images and both sides, from all but the marked patch tokens",
        "colours are clipped to the 1st to 99th percentile",
        "every map from its own smallest to its own largest weight",
        "grey where σ₁/σ₂ is below 1.3 and ν is not determined",
        "Share of the tokens at each place of the 12 × 12 grid that each rule marks after block",
        "each of its tokens counts at its place relative to the image, and several tokens may share one place",
        "(log scale), on every map of the last block; each learning target names its own scale",
        "0° to 90°, on every map.",
    ):
        assert words in page.text, words


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    name = "\"><img src=x onerror='alert(1)'>&amp;$x$.png"
    models = ("<script>alert(2)</script>$\\alpha$", "b</svg>")
    made = Made(depth=1, compared=True, drawn=1, names=(name,), models=models, skipped={name: "<b>bad</b>"})
    _, page = page_of(made, tmp_path)
    assert not page.all("script")
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert name in page.text
    assert models[0] in page.text
    assert "<b>bad</b>" in page.text
    assert not page.open


def test_two_sides_of_one_name_are_told_apart(tmp_path: Path) -> None:
    _, page = page_of(Made(depth=1, compared=True, drawn=0, models=("demo_vit", "demo_vit")), tmp_path)
    assert "demo_vit, first:" in page.text
    assert "demo_vit, second:" in page.text


def test_images_without_a_defective_block_say_so(tmp_path: Path) -> None:
    _, page = page_of(Made(depth=2, first=None, settings={"min_tokens": 20}), tmp_path)
    assert page.text.count("No block of this image is defective.") == 2


def test_a_block_of_undetermined_direction_has_an_empty_panel(tmp_path: Path) -> None:
    _, page = page_of(Made(settings={"min_gap": 2.0}, drawn=1), tmp_path)
    empty = [attributes["aria-label"] for tag, attributes in page.tags if tag == "div" and "aria-label" in attributes]
    assert empty == [f"Block {block}: the direction is not determined" for block in (0, 1)]


def test_the_table_has_a_row_a_block_and_side(tmp_path: Path) -> None:
    html, _ = page_of(Made(depth=40, compared=True, drawn=0), tmp_path)
    table = html[html.index('<table class="blocks sides">') :].split("</table>")[0]
    assert table.count("<tbody>") == 40
    assert table.count('<td class="model">demo_vit_clean</td>') == 40


def test_both_sides_have_one_name_everywhere(compared: tuple[str, Page], tmp_path: Path) -> None:
    words = "demo_vit: weights of demo_vit; demo_vit_clean: weights of demo_vit_clean"
    assert words in compared[1].text
    html, page = page_of(Made(depth=1, compared=True, drawn=0, models=("demo_vit", "demo_vit")), tmp_path)
    assert "demo_vit, first: " in page.text
    assert "Model, second" in page.text
    assert ">B</td>" not in html
    assert "A:" not in page.text


@pytest.mark.parametrize(
    ("sides", "names"),
    [
        ([("a", "x.pth"), ("b", "x.pth")], ["a", "b"]),
        ([("a", "weights/x.pth"), ("a", "run/model.safetensors")], ["x", "run"]),
        ([("a", "x.pth"), ("a", "other/x.pth")], ["first", "second"]),
    ],
)
def test_sides_are_called_by_what_tells_them_apart(sides: list[tuple[str, str]], names: list[str]) -> None:
    first, second = (SimpleNamespace(model=model, weights=weights) for model, weights in sides)
    first.other = second
    assert facts.short_names(first) == names  # type: ignore[arg-type]


def test_images_are_counted_as_the_settings_say(compared: tuple[str, Page], tmp_path: Path) -> None:
    assert "Images with 3 or more of them" in compared[1].text
    _, page = page_of(Made(depth=1, drawn=0, first=0, settings={"min_tokens": 5}), tmp_path)
    assert "Images with 5 or more of them" in page.text
    assert "Images with outlying tokens" not in page.text


def test_positions_are_told_as_shares_of_the_tokens_there(tmp_path: Path) -> None:
    _, page = page_of(Made(depth=1, drawn=0, settings={"resize": "square"}), tmp_path)
    assert "percent of the images" not in page.text
    assert "share of the tokens there, %" in page.text
    assert "several tokens may share one place" not in page.text


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (Made(depth=1), "Attention. Of cls to each patch in the last block, mean over heads;"),
        (Made(depth=1, has_cls=False), "Attention. The attention is not drawn: there is no cls token."),
        (Made(depth=1, attended=False), "Attention. The attention is not drawn: its kernel does not expose the"),
        (Made(depth=1, attended=False, compared=True), "The attention of demo_vit_clean is not drawn: its kernel"),
    ],
)
def test_attention_that_is_not_drawn_is_missing_for_a_reason(made: Made, words: str, tmp_path: Path) -> None:
    _, page = page_of(made, tmp_path)
    assert words in page.text
    assert ("Of cls to each patch" in page.text) == (made.has_cls and made.attended)


def test_tokens_that_are_not_finite_are_told_and_coloured(tmp_path: Path) -> None:
    html, page = page_of(Made(depth=3, broken=1, drawn=1), tmp_path)
    assert '<b class="broken">' in html
    assert ".broken {" in html
    for words in ("Tokens not finite3", "Tokens not finite 1", "a token that is not finite is grey"):
        assert words in page.text, words
    table = html[html.index('<table class="blocks">') :].split("</table>")[0]
    assert table.index("not finite") < table.index("median norm")
    assert "nan" not in page.text.split()


def test_a_page_of_finite_tokens_has_no_word_of_others(compared: tuple[str, Page]) -> None:
    assert "not finite" not in compared[1].text


def test_every_verdict_has_a_colour() -> None:
    assert set(COLOUR_OF) == set(get_args(VerdictKind))


def test_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    name = "new\nline\x1b[31m\u2028.png"
    shown = r"new\nline\x1b[31m\u2028.png"
    made = Made(depth=1, drawn=1, names=(name,), models=("vit\x1b[1m",), skipped={name: "broken\x9b"})
    html, page = page_of(made, tmp_path)
    assert printable_lines(html) == html
    assert page.text.count(shown) >= 2
    assert r"broken\x9b" in page.text
