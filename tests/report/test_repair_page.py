"""The page of a repair: one file, true words, nothing loaded, and it opens."""

from __future__ import annotations

import base64
import io
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from html_page import Page
from made_repair import DEPTH, FIRST, OUTCOMES, WORST
from matplotlib import colormaps
from PIL import Image
from rich.console import Console

from sinder_cli.repairing.results import RepairResult
from sinder_cli.repairing.settings import RepairSettings
from sinder_cli.report.cards import render_card
from sinder_cli.report.repair import facts
from sinder_cli.report.repair.page import guard_charts, read_lines, render_repair_page, samples_of, step_charts
from sinder_cli.report.tables import repair_table

MakeResult = Callable[..., RepairResult]


def text_of(result: RepairResult) -> str:
    return Page(render_repair_page(result)).text


def colour_of(result: RepairResult) -> str | None:
    """The class of the verdict's word."""
    return next(attributes["class"] for attributes in Page(render_repair_page(result)).all("b"))


def test_the_page_opens_with_a_verdict_in_words(make_result: MakeResult) -> None:
    text = text_of(make_result())
    assert "Repaired: outlying tokens at any block 8 → 0 of 128 on 2 images never trained on; largest norm" in text
    assert text.index("Repaired:") < text.index("Before and after")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (OUTCOMES["healthy"], "Healthy: nothing was trained, and the weights are bit-identical to the original's:"),
        (OUTCOMES["improved"], "Improved: outlying tokens at any block 8 → 4 of 128 on 2 images never trained on;"),
        (OUTCOMES["improved"], "Try --resume and a higher --max-steps (now 1,000), more images, or --mark norm."),
        (OUTCOMES["not improved"], "Not improved: the steps spoilt cls or good tokens, so none of them is kept, and"),
        (
            OUTCOMES["not improved"],
            "the weights are bit-identical to the original's: outlying tokens at any block 8 of 128",
        ),
        (
            {"changed": 0, "stopped_by": "no_gain"},
            "no step reduced the outlying tokens without spoiling cls or good tokens",
        ),
        ({"changed": 0, "stopped_by": "no_gain"}, "Try a lower --min-gain (now 3), more images, or --mark norm."),
        ({"changed": 0, "stopped_by": "fidelity"}, "Try smaller steps (lower --max-drift, now 0.05), more images,"),
        ({"also_trained": 1}, "on 1 image never trained on and 1 also trained on, since no other shows such a defect"),
        ({"images": 1, "also_trained": 1}, "on 1 image, also trained on since no other shows a defect"),
        (
            {"changed": 0, "stopped_by": "max_steps", "recipe": "paper", "mark": "norm", "norm_factor": 3.0},
            "Try --resume and a higher --max-steps (now 30,000), --recipe sinder, or more images.",
        ),
    ],
)
def test_the_verdict_does_not_claim_more_than_happened(
    make_result: MakeResult, how: dict[str, Any], words: str
) -> None:
    assert words in text_of(make_result(**how))


def test_the_verdict_is_the_same_everywhere(outcome: RepairResult) -> None:
    verdict = facts.verdict(outcome)
    said = f"{verdict.word}: {verdict.sentence}"
    assert verdict.word.lower() == outcome.summary["verdict"]
    page, card, terminal = text_of(outcome), " ".join(render_card(outcome).split()), printed(outcome)
    assert said in page
    assert said in card.replace("**", "")
    assert said in terminal
    for place in (page, card, terminal):
        assert verdict.advice in place
    advice = verdict.advice.removesuffix(facts.DRAWN_ALONE)
    assert bool(advice) == (outcome.summary["verdict"] in ("improved", "not improved"))


@pytest.mark.parametrize(("given", "cautioned"), [(0, True), (1, False)])
def test_a_verdict_from_drawn_pictures_alone_says_so(make_result: MakeResult, given: int, cautioned: bool) -> None:
    """Drawn pictures may not have what sets a defect off: a model that they call healthy need not be."""
    result = make_result(given=given)
    assert (facts.DRAWN_ALONE in facts.verdict(result).advice) is cautioned
    assert (facts.DRAWN_ALONE in text_of(result)) is cautioned


def test_the_advice_follows_the_reason_of_the_verdict(make_result: MakeResult) -> None:
    """A part of the good tokens may be spoilt though their median is not: the verdict knows, and the advice with it."""
    result = make_result(after=2, stopped_by="no_gain")
    result.summary["verdict"] = "not improved"
    assert facts.verdict(result).advice.startswith("Try a lower --min-gain")
    result.summary["verdict_reason"] = "spoilt"
    assert facts.verdict(result).advice.startswith("Try smaller steps (lower --max-drift")
    del result.summary["verdict_reason"]  # of an earlier version
    assert facts.verdict(result).advice.startswith("Try a lower --min-gain")


def test_what_is_not_repaired_is_never_green(outcome: RepairResult) -> None:
    kinds = {"healthy": "good", "repaired": "good", "improved": "open", "not improved": "bad"}
    kind = kinds[outcome.summary["verdict"]]
    assert facts.verdict(outcome).kind == colour_of(outcome) == kind
    codes = {"good": "32", "open": "33", "bad": "31"}  # ANSI: green, yellow, red
    assert f"\x1b[{codes[kind]}m{outcome.summary['verdict'].capitalize()}:" in printed(outcome, colours=True)
    assert all(f"\x1b[{code}m" not in printed(outcome, colours=True) for code in {"31", "32", "33"} - {codes[kind]})


def test_healthy_is_not_green_where_uncounted_norms_are_high(
    make_result: MakeResult,
) -> None:
    result = make_result(before=0, changed=0, steps=0, stopped_by="healthy", mark="weights")
    result.summary["scan"]["blocks"][2]["max_ratio"] = 41.3
    verdict = facts.verdict(result)
    assert (verdict.kind, verdict.word) == ("none", "Healthy")
    assert "largest norm 41.3 × the median (block 2)" in verdict.sentence
    assert "Try --mark norm" in verdict.advice
    assert verdict.advice in text_of(result)


def test_a_healthy_model_is_said_to_be_untouched(make_result: MakeResult) -> None:
    result = make_result(**OUTCOMES["healthy"])
    page, card = text_of(result), render_card(result)
    assert "No step was taken: nothing was trained." in page
    assert "The original marks no token of these images at any block." in page
    assert "register neurons" not in page
    assert "# `demo_vit`, unchanged" in card
    assert "Nothing was trained: there was nothing to repair." in card


def test_the_tables_say_what_the_summary_says(make_result: MakeResult) -> None:
    result = make_result(after=2, stopped_by="max_steps")
    rows = {row.name: row for row in facts.comparison(result)}
    before, after = (result.summary["defects"][side] for side in ("before", "after"))
    assert rows["Outlying tokens at any block"][1:3] == (str(before["tokens"]), str(after["tokens"])) == ("8", "4")
    assert rows["Images with an outlying token"][1:3] == ("2 of 2", "2 of 2")
    assert rows["Largest norm ÷ median of its image"].before.endswith(f"(block {WORST})")
    one, two = (result.summary["fidelity"]["to_inpainted"][side] for side in ("before", "after"))
    for name, key in (
        ("cls to the inpainted original, cosine", "cls"),
        ("Good tokens to it, median cosine", "good"),
        ("Good tokens to it, 1st percentile", "good_p01"),
        ("Marked tokens to it, mean cosine", "marked"),
    ):
        assert rows[name][1:3] == (f"{one[key]:.4f}", f"{two[key]:.4f}")
    original = rows["cls to the original, cosine (no goal)"]
    assert original.after == f"{result.summary['cls_cosine']:.4f}"
    assert "outliers spoil its cls" in original.note


def test_each_block_has_a_row(make_result: MakeResult) -> None:
    rows = facts.block_rows(make_result(after=1, stopped_by="max_steps"))
    assert [row.block for row in rows] == list(range(DEPTH))
    assert [(row.before, row.after) for row in rows] == [(0, 0), (8, 2), (8, 2), (8, 2)]
    assert [row.predicted for row in rows] == ["–", "yes", "no", "no"]
    assert [row.along for row in rows] == ["–", "8 of 8", "0 of 8", "0 of 8"]
    assert [row.rule for row in rows] == ["–", "weights", "norm", "norm"]
    assert [row.angle for row in rows] == ["–", "12°", "72°", "72°"]
    assert [row.gap for row in rows] == ["1.02*", "2.50", "2.50", "∞"]
    assert [row.stands_out for row in rows] == [False, True, True, True]


def test_it_is_not_healthy_where_the_rule_marks_nothing(
    make_result: MakeResult,
) -> None:
    result = make_result(**OUTCOMES["healthy"])
    result.summary.update(verdict="not improved", stopped_by="nothing_marked")
    result.summary["scan"]["standing"] = 5
    result.config["settings"]["mark"] = "weights"
    verdict = facts.verdict(result)
    assert (verdict.kind, verdict.word) == ("bad", "Not improved")
    assert (
        "5 of 128 patch tokens of 2 images stand out by norm, and the rule in force (--mark weights" in verdict.sentence
    )
    assert verdict.advice.startswith("Try --mark norm")
    assert "marks none of the tokens that stand out" in text_of(result)


def test_tokens_that_stand_out_unmarked_and_drawn_images_are_reported(make_result: MakeResult) -> None:
    result = make_result()
    result.summary["defects"]["after"]["standing"] = 7
    result.summary["drawn_on_the_guard"] = 1
    sentence = facts.verdict(result).sentence
    assert "; 7 more stand out by norm, but the rule in force does not mark them." in sentence
    assert "on 2 images never trained on (1 of them drawn by the program)" in sentence
    result.summary["drawn_on_the_guard"] = 2
    assert "on 2 images never trained on (all drawn by the program)" in facts.verdict(result).sentence


@pytest.mark.parametrize(
    ("mark", "along", "expected"),
    [("auto", 0, "norm"), ("auto", 5, "both"), ("auto", 8, "weights"), ("norm", 8, "norm"), ("weights", 8, "weights")],
)
def test_the_rule_that_trained_a_block_is_named(make_result: MakeResult, mark: str, along: int, expected: str) -> None:
    result = make_result()
    result.config["settings"]["mark"] = mark
    result.summary["scan"]["blocks"][FIRST]["marked_by_weights"] = along
    assert facts.block_rows(result)[FIRST].rule == expected


def test_a_direction_that_is_not_determined_is_explained(make_result: MakeResult) -> None:
    result = make_result()
    assert "*: ν is not determined" in facts.block_words(result)
    result.config["settings"]["min_gap"] = 0
    assert "*" not in facts.block_words(result)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "sinder"),
        ({"max_drift": 0.1, "seed": 4}, "sinder"),
        ({"step": "polyak", "eval_every": 1}, "sinder, with step polyak, eval_every 1"),
        ({"recipe": "paper"}, "paper"),
        ({"recipe": "paper", "max_steps": 40}, "paper, with max_steps 40"),
    ],
)
def test_the_recipe_is_named_with_what_is_not_of_it(given: dict[str, Any], expected: str) -> None:
    assert facts.recipe_words(RepairSettings.model_validate(given).model_dump()) == expected


def test_marked_tokens_are_followed_and_new_outliers_are_not_hidden(make_result: MakeResult) -> None:
    result = make_result(after=1, stopped_by="max_steps")
    rows = {row.name: row for row in facts.marked_tokens(result)}
    assert rows["Still outlying at some block"][1:3] == ("8 of 8", "2 of 8")
    assert rows["With a cosine of 0.9 or more"].after == "6 of 8"
    assert rows["Other tokens that are outlying"][1:3] == ("0 of 120", "0 of 120")
    good = (~result.before.ever[0]).nonzero()[0].tolist()
    result.after.outlying[0, 0, good[0], good[1]] = True
    assert facts.marked_tokens(result)[-1].after == "1 of 120"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "or its norm is above 6 × the median, or it stays that high over two blocks"),
        ({"mark": "norm", "norm_factor": 4.5}, "its norm is above 4.5 × the median of its image, and this ratio is"),
        ({"mark": "weights"}, "and equation (5) marks it with a direction that is determined."),
        ({"recipe": "paper"}, "where equation (5) marks it, whatever its norm"),
    ],
)
def test_the_page_states_the_rule_in_force(make_result: MakeResult, settings: dict[str, Any], words: str) -> None:
    assert words in text_of(make_result(stopped_by="max_steps", after=2, **settings))


def test_nothing_on_the_page_loads_anything(make_result: MakeResult) -> None:
    html = render_repair_page(make_result())
    page = Page(html)
    assert page.addresses() == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert {link["href"] for link in page.all("a")} == {"https://arxiv.org/abs/2407.16826"}
    assert html.count("://") == len(page.all("a"))
    assert "url(" not in html.replace("url(#", "")  # a part of the same drawing
    assert "@import" not in html
    assert not page.open  # every tag closed


def test_every_picture_is_inside_the_page_and_told_in_words(make_result: MakeResult) -> None:
    pictures = Page(render_repair_page(make_result())).all("img")
    assert len(pictures) == 2 * (1 + 2 * 4) + 2  # the image, four maps before and after, and two scales
    for picture in pictures:
        assert (picture["src"] or "").startswith("data:image/")
        assert len(picture["alt"] or "") > 10


def test_each_image_has_maps(make_result: MakeResult) -> None:
    shown = [picture["alt"] or "" for picture in Page(render_repair_page(make_result(images=1))).all("img")][2:]
    assert [words.partition(":")[0] for words in shown] == [
        "image-0.jpg, as the model saw it",
        f"Norms ÷ median of image-0.jpg after block {WORST}, before",
        f"Norms ÷ median of image-0.jpg after block {WORST}, after",
        f"Norms ÷ median of image-0.jpg after block {DEPTH - 1}, before",
        f"Norms ÷ median of image-0.jpg after block {DEPTH - 1}, after",
        "Principal components of the tokens of image-0.jpg, before, as colours",
        "Principal components of the tokens of image-0.jpg, after, as colours",
        "Cosine of each token of image-0.jpg to the inpainted original, before",
        "Cosine of each token of image-0.jpg to the inpainted original, after",
    ]


def test_the_worst_block_being_the_last_is_shown_once(make_result: MakeResult) -> None:
    result = make_result()
    result.summary["defects"]["before"]["worst_block"] = DEPTH - 1
    assert samples_of(result).blocks == [DEPTH - 1]
    assert len(samples_of(result).images[0].maps) == 3
    assert f"after the last block, {DEPTH - 1}, which has the largest of all" in text_of(result)


def test_a_map_of_fidelity_has_the_colours_of_the_scale(make_result: MakeResult) -> None:
    result = make_result()
    fidelity = samples_of(result).images[1].maps[-1]
    for panel, side in zip(fidelity, (result.before, result.after), strict=True):
        drawn = Image.open(io.BytesIO(base64.b64decode(panel.image.uri.partition(",")[2])))
        small = drawn.resize((8, 8), Image.Resampling.NEAREST)
        for y, x in np.ndindex(8, 8):
            at = min(max((side.to_inpainted[1, y, x].item() - 0.5) / 0.5, 0.0), 1.0)
            expected = np.array(colormaps["cividis_r"](at)[:3]) * 255
            assert np.abs(np.array(small)[y, x] - expected).max() <= 2


def test_weights_that_did_not_change_are_shown_once(make_result: MakeResult) -> None:
    html = render_repair_page(make_result(**OUTCOMES["not improved"]))
    assert len(Page(html).all("img")) == 2 * (1 + 4) + 2
    assert "there is one picture of each kind" in " ".join(Page(html).text.split())


def test_captions_say_how_the_figures_were_made(make_result: MakeResult) -> None:
    text = text_of(make_result())
    for words in (
        "residual stream after each block, cosines are taken after the last block, all before the final norm",
        "one logarithmic scale for every map",
        "before and after together",
        "clipped to its 1st to 99th percentile over both sides",
        "replaced, where it appears, by the average of its neighbours",
        "1 where the model gives what it would give without outliers. One scale for every map, 0.5 to 1",
        "70.4 → 55.6 %",
        "step 0 is the original",
    ):
        assert words in text


def test_names_cannot_break_out_of_the_page(make_result: MakeResult) -> None:
    name = "\"><img src=x onerror='alert(1)'>&amp;.png"
    page = Page(render_repair_page(make_result(names=[name, "b.png"], model="<script>alert(2)</script>")))
    assert not page.all("script")
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert name in page.text
    assert any(name in (picture["alt"] or "") for picture in page.all("img"))


def test_folders_of_the_images_are_not_reported(make_result: MakeResult) -> None:
    assert "somewhere" not in render_repair_page(make_result(names=["/somewhere/private/a.png", "somewhere/b.png"]))


def test_the_page_copes_with_no_steps_and_no_cls(make_result: MakeResult) -> None:
    result = make_result(images=1, steps=0, before=4, changed=0, has_cls=False, stopped_by="max_steps")
    page = Page(render_repair_page(result))
    assert "No step was recorded." in page.text
    assert "no cls token" in page.text
    assert "cls to the original" not in page.text
    assert "cls 0" not in facts.verdict(result).sentence
    assert "no cls token" in printed(result)
    assert not page.all("svg")


def test_images_without_a_marked_token_are_no_fault(make_result: MakeResult) -> None:
    result = make_result(before=0, after=0, changed=3, stopped_by="max_steps", elsewhere=2)
    assert result.summary["verdict"] == "not improved"
    assert "none marked" in text_of(result)
    assert "none marked" in printed(result)
    assert facts.verdict(result).sentence.startswith("outlying tokens at any block 0 → 0 on 2 images never trained on;")
    assert facts.marked_tokens(result) == []


def test_numbers_that_are_not_finite_are_said_to_be_so(make_result: MakeResult) -> None:
    result = make_result()
    result.before.ratios[1, 0, 0, 0] = math.inf
    result.before.to_inpainted[0, 1, 1] = math.nan
    result.summary["defects"]["before"] |= {"max_ratio": math.inf}
    assert "largest norm not finite × the median" in text_of(result)
    assert "not finite" in printed(result)


def test_a_missing_metrics_file_leaves_the_charts_out(make_result: MakeResult) -> None:
    result = make_result()
    (result.folder / "metrics.jsonl").unlink()
    assert "No step was recorded." in render_repair_page(result)


def test_a_clean_run_has_a_curve_of_clean_images_only() -> None:
    drawn = step_charts([{"step": 1, "loss": None, "clean_fraction": 0.5}], 0.75)
    assert [chart.title for chart in drawn] == ["Clean images"]


def test_what_the_guard_saw_is_drawn_from_the_original_on(make_result: MakeResult) -> None:
    result = make_result()
    drawn = guard_charts(read_lines(result.folder / "evaluations.jsonl"), result)
    assert [chart.title for chart in drawn] == ["Outlying tokens, guard", "cls, guard", "Good tokens, guard"]
    for chart in drawn:
        assert len(chart.rows) == 1 + 3  # the original, and three looks
        assert chart.rows[0]["step"] == 0
        assert chart.draw.keywords["marks"].kept == chart.rows[-1]["step"]  # type: ignore[attr-defined]
    assert guard_charts([], result) == []
    blind = make_result(has_cls=False)
    assert len(guard_charts(read_lines(blind.folder / "evaluations.jsonl"), blind)) == 2


def test_the_table_fits_a_terminal_and_ends_with_the_report(make_result: MakeResult) -> None:
    result = make_result(before=6, after=3, stopped_by="max_steps", images=12)
    lines = rendered(result).splitlines()
    assert max(len(line) for line in lines if str(result.folder) not in line) <= 80
    end = " ".join(printed(result).split()).rpartition("run directory: ")[2]
    assert end == f"{result.folder} outlying tokens 72 → 36, report: {result.folder / 'report.html'}"


def rendered(result: RepairResult, colours: bool = False, width: int = 80) -> str:
    file = io.StringIO()
    system: Any = "standard" if colours else None
    console = Console(
        file=file, width=width, force_terminal=colours, color_system=system, highlight=False, markup=False
    )
    console.print(repair_table(result))
    return file.getvalue()


def printed(result: RepairResult, colours: bool = False) -> str:
    """The table on one endless line."""
    return " ".join(rendered(result, colours, width=2000).split())


def test_importing_the_pages_is_cheap() -> None:
    modules = ("repair.page", "repair.pictures", "cards", "analysis.page", "manual")
    code = f"import sys; {'; '.join(f'import sinder_cli.report.{name}' for name in modules)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "matplotlib", "PIL", "jinja2"} & set(loaded)
