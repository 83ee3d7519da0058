"""Both pages as a browser shows them, on a phone and on a desk."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from headless import DARK, HEIGHT, LIGHT, Seen, audit, browser, look, printed, unpacked
from made_analysis import Made
from PIL import Image

from sinder_cli.events import silent
from sinder_cli.repairing.results import RepairResult
from sinder_cli.report.analysis.page import write_analysis
from sinder_cli.report.repair.page import render_repair_page

pytestmark = pytest.mark.slow
Look = Callable[[str, int], Seen]
MakeResult = Callable[..., RepairResult]
WIDTHS = (390, 1400)  # a phone and a desk
LONG = "a" * 120 + ".png"
ANALYSES = {
    "one side": Made(depth=12, registers=True, names=(LONG,), skipped={f"{LONG}.jpg": "it is truncated"}),
    "a comparison of 40 blocks": Made(depth=40, grid=(8, 12), compared=True, first=22, models=("hf/" + "m" * 90, "n")),
    "two blocks without cls or defects": Made(depth=2, first=None, has_cls=False),
}


@pytest.fixture
def seen(tmp_path: Path) -> Iterator[Look]:
    program = browser()
    if program is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    with tempfile.TemporaryDirectory(dir=tmp_path, ignore_cleanup_errors=True) as folder:
        yield lambda page, width: look(program, page, width, Path(folder))


def require_faultless(seen: Seen, width: int, figures: int) -> None:
    assert (seen.width, seen.overflow) == (width, 0)
    assert seen.figures >= figures
    assert seen.hidden == []
    assert seen.loaded == []
    assert seen.console == []
    with Image.open(seen.picture) as image:
        assert image.size == (max(width, 500), HEIGHT)
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100


@pytest.mark.parametrize("name", ANALYSES)
def test_a_browser_shows_all_of_an_analysis_and_loads_nothing(name: str, tmp_path: Path, seen: Look) -> None:
    write_analysis(tmp_path / "out", ANALYSES[name].result(), silent)
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    for width in WIDTHS:
        require_faultless(seen(page, width), width, figures=6)


def test_a_browser_shows_all_of_a_repair_and_loads_nothing(make_result: MakeResult, seen: Look) -> None:
    page = render_repair_page(make_result(names=[LONG, "b.png"]))
    for width in WIDTHS:
        require_faultless(seen(page, width), width, figures=2 * 9 + 2 + 5)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ('<p style="width:2000px">wide', lambda seen: seen.overflow > 0),
        ('<img src="data:image/png;base64,AAAA" style="width:9px;height:9px">', lambda seen: seen.hidden),
        ('<svg style="width:0"></svg>', lambda seen: seen.hidden),
        ('<img src="http://127.0.0.1:9/x.png" width="9" height="9">', lambda seen: seen.console),
        ("<script>1</script>", lambda seen: seen.console),
    ],
)
def test_what_is_looked_for_would_be_found(
    make_result: MakeResult, fault: str, found: Callable[[Seen], object], seen: Look
) -> None:
    page = render_repair_page(make_result()).replace("</h1>", f"</h1>{fault}")
    assert found(seen(page, 390))


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["one side", "a comparison of 40 blocks", "a repair"])
def test_everybody_can_read_it(name: str, scheme: str, tmp_path: Path, make_result: MakeResult) -> None:
    """Contrast, names of pictures and tables, landmarks and headings, as axe-core judges them."""
    pytest.importorskip("axe_core_python")
    program = browser()
    if program is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    if name in ANALYSES:
        write_analysis(tmp_path / "out", ANALYSES[name].result(), silent)
        page = (tmp_path / "out" / "report.html").read_text("utf-8")
    else:
        page = render_repair_page(make_result())
    found = audit(program, page, scheme, tmp_path)
    assert found["dark"] is (scheme == DARK)
    assert found["passed"] >= 20
    assert found["violations"] == []


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_pages_print_whole_and_on_white(scheme: str, tmp_path: Path, make_result: MakeResult) -> None:
    """Dark mode is for screens: both schemes print the same, on some pages, none of them cut at the side."""
    program = browser()
    if program is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    write_analysis(tmp_path / "out", ANALYSES["one side"].result(), silent)
    pages = [(tmp_path / "out" / "report.html").read_text("utf-8"), render_repair_page(make_result())]
    for page, most in zip(pages, (9, 9), strict=True):
        pdf = printed(program, page, scheme, tmp_path)
        assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= most  # sheets
        filled = {tuple(map(float, found)) for found in re.findall(rb"([\d.]+) ([\d.]+) ([\d.]+) rg", unpacked(pdf))}
        assert filled
        assert not {colour for colour in filled if 0.95 < min(colour) < 1}  # the paper of the screen


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ('<p style="color:#999;background:#aaa">pale</p>', "color-contrast"),
        ('<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">', "image-alt"),
        ("<a href='#'></a>", "link-name"),
    ],
)
def test_what_axe_looks_for_would_be_found(fault: str, rule: str, tmp_path: Path, make_result: MakeResult) -> None:
    pytest.importorskip("axe_core_python")
    program = browser()
    if program is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    page = render_repair_page(make_result()).replace("</h1>", f"</h1>{fault}", 1)
    assert rule in {each.split(":")[0] for each in audit(program, page, LIGHT, tmp_path)["violations"]}


def test_the_keyboard_reaches_every_table_that_scrolls(make_result: MakeResult, tmp_path: Path) -> None:
    write_analysis(tmp_path / "out", ANALYSES["one side"].result(), silent)
    pages = [(tmp_path / "out" / "report.html").read_text("utf-8"), render_repair_page(make_result())]
    for page in pages:
        assert page.count('class="scroll"') == page.count('class="scroll" tabindex="0"') > 0
