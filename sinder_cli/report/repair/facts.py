"""Words and numbers that page, model card and table of a repair share: a verdict, and rows of tables.

Everything except `marked_tokens` is made from `summary.json` and `config.json` alone, so that it also works for a
run that ended long ago.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sinder_cli.defects.settings import CERTAIN, MOST_GAP, NORM_FACTOR, RISE, SLACK, Mark
from sinder_cli.files import public_model, public_source
from sinder_cli.repairing.settings import RECIPES, RepairSettings
from sinder_cli.repairing.verdict import VerdictWord, is_no, is_spoilt, verdict_in
from sinder_cli.report.formatting import NOTHING, Named, counted, degrees, duration, number, percent, setting_rows

if TYPE_CHECKING:
    from torch import Tensor

    from sinder_cli.repairing.results import RepairResult

KINDS: dict[VerdictWord, str] = {"healthy": "good", "repaired": "good", "improved": "open", "not improved": "bad"}
AS_IT_WAS = "the weights are bit-identical to the original's"
NO_CLS, NONE_MARKED = "no cls token", "none marked"
NEAR = 0.9  # cosine from which a marked token counts as equal to that of the inpainted original


class RepairVerdict(NamedTuple):
    """Verdict on a repair: `kind` is `good`, `open`, `bad` or `none`, for colour; `word` opens the sentence."""

    kind: str
    word: str
    sentence: str
    advice: str  # what to try next; empty where there is nothing left to do


class Recorded(Protocol):
    """A repair that has ended, as `summary.json` and `config.json` describe it."""

    @property
    def folder(self) -> Path: ...

    @property
    def summary(self) -> dict[str, Any]: ...

    @property
    def config(self) -> dict[str, Any]: ...


class Compared(NamedTuple):
    """One measure of the original and of the repaired model."""

    name: str
    before: str
    after: str
    note: str = ""  # explanation, if the name needs one


class BlockComparison(NamedTuple):
    """One block: its outlying tokens on the guard's images, and what the scan of the original found in it."""

    block: int
    before: int  # outlying tokens
    after: int
    ratio_before: str  # largest norm ÷ median
    ratio_after: str
    seen: int  # outlying tokens of all images that were looked at, in the original
    along: str  # how many of them lie along the direction that the weights predict
    angle: str  # between the direction that they share and the predicted one
    gap: str  # σ₁/σ₂ of the predicted direction
    predicted: str  # `yes` if the weights predict these outliers, else `no`
    rule: str  # what marked them: the weights, their norm, or both

    @property
    def stands_out(self) -> bool:
        """True if the guard's images have an outlying token in this block, before or after."""
        return bool(self.before or self.after)


DRAWN_ALONE = "Judged on drawn images alone: photographs (--data) may show defects that these do not."


def verdict(result: Recorded) -> RepairVerdict:
    """Return the outcome of a repair as one sentence with numbers; terminal, page and card show the same one."""
    found = _verdict(result)
    if result.config["images"]["given"]:
        return found
    return found._replace(advice=f"{found.advice} {DRAWN_ALONE}".lstrip())


def _verdict(result: Recorded) -> RepairVerdict:
    summary, settings = result.summary, result.config["settings"]
    word = verdict_in(summary)
    if word == "healthy":
        return _healthy(summary, settings)
    if summary["stopped_by"] == "nothing_marked":
        return _nothing_marked(summary, settings)
    before, after = (summary["defects"][side] for side in ("before", "after"))
    advice = "" if word == "repaired" else _advice(summary, settings)
    if is_no(summary) and not summary["changed_weights"]:
        why = (
            "the steps spoilt cls or good tokens, so none of them is kept"
            if summary["stopped_by"] == "fidelity"
            else "no step reduced the outlying tokens without spoiling cls or good tokens"
        )
        found = (
            f"outlying tokens at any block {before['tokens']:,}{_of_all(summary)};"
            f" largest norm {_ratio(before)}; {_fidelity(summary, False)}"
        )
        return RepairVerdict(KINDS[word], _title(word), f"{why}, and {AS_IT_WAS}: {found}.", advice)
    change = (
        f"outlying tokens at any block {before['tokens']:,} → {after['tokens']:,}{_of_all(summary)};"
        f" largest norm {_ratio(before)} → {_ratio(after)}; {_fidelity(summary, True)}{_elsewhere(summary)}"
        f"{_standing(summary)}."
    )
    return RepairVerdict(KINDS[word], _title(word), change, advice)


def title(summary: dict[str, Any]) -> str:
    """Return the words behind the model's name; only a model that was improved is called repaired."""
    if not summary["changed_weights"]:
        return ", unchanged"
    return ", changed" if is_no(summary) else ", repaired"


def _elsewhere(summary: dict[str, Any]) -> str:
    """Return what is left on images with kinds of defects that the guard does not show; empty without any."""
    found = summary.get("kinds_not_on_the_guard")
    if not found:
        return ""
    images = counted(found["images"], "image")
    return (
        f"; outlying tokens on {images} trained on, with defects of other kinds:"
        f" {found['before']:,} → {found['after']:,}"
    )


def _standing(summary: dict[str, Any]) -> str:
    """Return how many of the guard's tokens stand out but are not marked by the rule in force; empty without any."""
    after = summary["defects"]["after"]
    unmarked = after.get("standing", 0) - after["tokens"]
    return f"; {unmarked:,} more stand out by norm, but the rule in force does not mark them" if unmarked > 0 else ""


def _nothing_marked(summary: dict[str, Any], settings: dict[str, Any]) -> RepairVerdict:
    """Return the verdict on a model whose outlying tokens the rule in force does not mark."""
    scan = summary["scan"]
    worst = max(scan["blocks"], key=lambda each: each["max_ratio"])
    rule = f"--mark {settings['mark']}, --norm-factor {number(settings['norm_factor'])}"
    sentence = (
        f"nothing was trained, and {AS_IT_WAS}: {scan['standing']:,} of {scan['tokens']:,} patch tokens of"
        f" {counted(scan['images'], 'image')} stand out by norm, and the rule in force ({rule}) marks none of them;"
        f" largest norm {_ratio(worst)}."
    )
    advice = f"Try --mark norm --norm-factor {number(NORM_FACTOR)}. Run sinder analyze to see where they are."
    return RepairVerdict(KINDS["not improved"], _title("not improved"), sentence, advice)


def _healthy(summary: dict[str, Any], settings: dict[str, Any]) -> RepairVerdict:
    """Return the verdict on a model without a defect.

    Its kind is `none` instead of `good` if there are high norms that the rule in force does not count as defects.
    """
    scan = summary["scan"]
    worst = max(scan["blocks"], key=lambda each: each["max_ratio"])
    sentence = (
        f"nothing was trained, and {AS_IT_WAS}: none of {scan['tokens']:,} patch tokens of"
        f" {counted(scan['images'], 'image')} is marked at any block; largest norm {_ratio(worst)}."
    )
    if worst["max_ratio"] <= NORM_FACTOR:
        return RepairVerdict(KINDS["healthy"], "Healthy", sentence, "")
    rule = f"--mark {settings['mark']}, --norm-factor {number(settings['norm_factor'])}"
    advice = (
        f"Norms above {number(NORM_FACTOR)} × the median were seen, which the rule in force ({rule}) does not count as"
        f" defects. Try --mark norm --norm-factor {number(NORM_FACTOR)}. Run sinder analyze to see where they are."
    )
    return RepairVerdict("none", "Healthy", sentence, advice)


def _advice(summary: dict[str, Any], settings: dict[str, Any]) -> str:
    """Return what to try next, beginning with what the reason for stopping suggests."""
    greedy = settings["step"] == "greedy"
    smaller = {
        "greedy": f"smaller steps (lower --max-drift, now {number(settings['max_drift'])})",
        "polyak": f"smaller steps (lower --trust, now {number(settings['trust'])})",
        "sgd": f"smaller steps (lower --lr, now {number(settings['lr'])})",
    }
    first = {
        "fidelity": smaller[settings["step"]],
        "max_steps": f"--resume and a higher --max-steps (now {settings['max_steps']:,})",
        "no_gain": f"a lower --min-gain (now {number(settings['min_gain'])})"
        if greedy
        else f"a higher --stop-clean-fraction (now {number(settings['stop_clean_fraction'])})",
    }
    stopped = "fidelity" if is_spoilt(summary) else summary["stopped_by"]
    by_norm = "--mark norm" + ("" if settings["norm_factor"] else f" --norm-factor {number(NORM_FACTOR)}")
    ways = [
        *([first[stopped]] if stopped in first else []),
        *([] if settings["recipe"] == "sinder" else ["--recipe sinder"]),
        "more images",
        *([] if settings["mark"] == "norm" else [by_norm]),
    ]
    return f"Try {_listed(ways)}. Run sinder analyze to see which tokens stand out, and at which blocks."


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, or {parts[-1]}"


def _title(word: str) -> str:
    return word[:1].upper() + word[1:]


def _of_all(summary: dict[str, Any]) -> str:
    """Return the total number of patch tokens and the images that they are from, in words."""
    total = _patch_tokens(summary)
    of = "" if total is None else f" of {total:,}"
    return f"{of} on {guard_images(summary)}"


def _patch_tokens(summary: dict[str, Any]) -> int | None:
    """Return the number of the guard's patch tokens; None without any outlying token, before and after."""
    for side in ("before", "after"):
        defects = summary["defects"][side]
        if defects["tokens"]:
            return round(defects["tokens"] / defects["fraction"])
    return None


def guard_images(summary: dict[str, Any]) -> str:
    """Return in words the images that a repair is judged on, and whether it was trained on any of them."""
    count, also = summary["evaluation_images"], summary["also_trained"]
    if also >= count:
        return f"{counted(count, 'image')}, also trained on since no other shows a defect"
    words = f"{counted(count - also, 'image')} never trained on"
    words += f" and {also:,} also trained on, since no other shows such a defect" if also else ""
    drawn = summary.get("drawn_on_the_guard", 0)
    return words + (f" ({'all' if drawn == count else f'{drawn:,} of them'} drawn by the program)" if drawn else "")


def _ratio(defects: dict[str, Any]) -> str:
    """Return the largest norm as a multiple of the median of its image, and its block."""
    block = defects["worst_block"] if "worst_block" in defects else defects["block"]
    return f"{_times(defects['max_ratio'])} × the median (block {block})"


def _times(ratio: float) -> str:
    return number(ratio, 3)


def _fidelity(summary: dict[str, Any], both: bool) -> str:
    """Return the cosines to the inpainted original, before and after, or before alone."""
    before, after = (summary["fidelity"]["to_inpainted"][side] for side in ("before", "after"))
    parts = [
        f"{name} {_cosine(before[key])}" + (f" → {_cosine(after[key])}" if both else "")
        for key, name in (("cls", "cls"), ("good", "good tokens"), ("marked", "marked tokens"))
        if before[key] is not None
    ]
    return f"cosine to the inpainted original: {', '.join(parts)}"


def _cosine(value: float | None, missing: str = NOTHING) -> str:
    return missing if value is None else f"{value:.4f}"


def comparison(result: Recorded) -> list[Compared]:
    """Return the comparison of before and after, measure by measure, over all images of the guard."""
    summary = result.summary
    before, after = (summary["defects"][side] for side in ("before", "after"))
    one, two = (summary["fidelity"]["to_inpainted"][side] for side in ("before", "after"))
    images = f"of {summary['evaluation_images']:,}"

    def ratio(side: dict[str, Any]) -> str:
        return f"{_times(side['max_ratio'])} (block {side['worst_block']})"

    def cosines(name: str, key: str, note: str, missing: str = NOTHING) -> Compared:
        return Compared(name, _cosine(one[key], missing), _cosine(two[key], missing), note)

    rows = [
        Compared("Outlying tokens at any block", f"{before['tokens']:,}", f"{after['tokens']:,}"),
        Compared("Share of all patch tokens", percent(before["fraction"]), percent(after["fraction"])),
        Compared("Images with an outlying token", f"{before['images']:,} {images}", f"{after['images']:,} {images}"),
        Compared("Largest norm ÷ median of its image", ratio(before), ratio(after)),
        cosines("cls to the inpainted original, cosine", "cls", _cls_words(one, two), NO_CLS),
        cosines("Good tokens to it, median cosine", "good", "tokens that the original marks at no block"),
        *([cosines("Good tokens to it, mean cosine", "good_mean", "of the same tokens")] if "good_mean" in one else []),
        cosines("Good tokens to it, 1st percentile", "good_p01", "one in a hundred is lower"),
        cosines("Marked tokens to it, mean cosine", "marked", "marked by the original at some block", NONE_MARKED),
    ]
    shares = list((summary.get("shift_retrieval") or {}).values())  # a run of an earlier version has none
    if shares and all(shares):
        words = "nearest to the same place of a view shifted by two patches; rises for a ruined model too"
        found = [NOTHING if each["marked"] is None else percent(each["marked"]) for each in shares]
        rows.append(Compared("Marked tokens found again, shifted (no goal)", found[0], found[1], words))
    to_original = summary["fidelity"]["to_original"]["cls"]
    if to_original is None:
        return rows
    note = "nearness to the original is no goal: outliers spoil its cls, and a repair may move it far"
    return [*rows, Compared("cls to the original, cosine (no goal)", "1", _cosine(to_original), note)]


def _cls_words(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """Return what to say of cls; where it is further than before, that it moved as inpainting moves it, only more."""
    way = two.get("cls_way")  # a run of an earlier version has none
    if way is None or one["cls"] is None or two["cls"] >= one["cls"] - SLACK:
        return "mean over the images"
    return f"mean over the images; it moved the way that inpainting moves it, and further (cosine of both {way:.2f})"


def block_rows(result: Recorded) -> list[BlockComparison]:
    """Return one row per block: outlying tokens and norms on the guard, before and after, and what weights predict."""
    summary, settings = result.summary, result.config["settings"]
    sides = (summary["defects"][side]["blocks"] for side in ("before", "after"))
    return [
        BlockComparison(
            block=before["block"],
            before=before["tokens"],
            after=after["tokens"],
            ratio_before=_times(before["max_ratio"]),
            ratio_after=_times(after["max_ratio"]),
            seen=seen["tokens"],
            along=f"{seen['marked_by_weights']:,} of {seen['tokens']:,}" if seen["tokens"] else NOTHING,
            angle=degrees(seen["angle_deg"]),
            gap=_gap(seen["gap"]) + ("" if seen["gap"] >= settings["min_gap"] else "*"),
            predicted=NOTHING if seen["angle_deg"] is None else "yes" if seen["predicted"] else "no",
            rule=_rule(seen, settings["mark"]),
        )
        for before, after, seen in zip(*sides, summary["scan"]["blocks"], strict=True)
    ]


def _rule(seen: dict[str, Any], mark: Mark) -> str:
    """Return what marked the tokens of a block: `weights`, `norm` or `both`."""
    if not seen["tokens"]:
        return NOTHING
    along = 0 if mark == "norm" else seen["marked_by_weights"]
    return "norm" if not along else "weights" if along == seen["tokens"] else "both"


def _gap(gap: float) -> str:
    return "∞" if gap >= MOST_GAP else f"{gap:.2f}" if gap < 100 else number(gap)


def block_words(result: Recorded) -> str:
    """Return the meaning of the columns of `block_rows` that do not refer to the guard."""
    scan, settings = result.summary["scan"], result.config["settings"]
    weak = any(each["gap"] < settings["min_gap"] for each in scan["blocks"])
    undetermined = f" *: ν is not determined, since σ₁/σ₂ is under {number(settings['min_gap'])}." if weak else ""
    images = counted(scan["images"], "image")
    return (
        f"The scan was of {images}. Along ν: tokens that equation (5) marks with the direction ν that the weights"
        " predict. Angle: between the direction that the tokens share and ν. Predicted: that angle is at most 30° and ν"
        " is determined. Trained by: the reason why tokens were marked, and so trained: they lie along ν (weights), by"
        f" their norm alone (norm), or some for one reason and some for the other (both).{undetermined}"
    )


def rule_words(result: Recorded) -> str:
    """Return in words when a token counts as outlying by the rule in force."""
    settings = result.config["settings"]
    factor = settings["norm_factor"]
    if factor == 0:
        return "A token counts as outlying at a block where equation (5) marks it, whatever its norm."
    high = (
        f"its norm is above {number(factor)} × the median of its image, and this ratio is above {RISE} ×"
        " its value at the embedding"
    )
    more = {
        "norm": "",
        "weights": ", and equation (5) marks it with a direction that is determined",
        "auto": ", and it is certain: equation (5) marks it with a direction that is determined, or its norm is above"
        f" {number(CERTAIN * factor)} × the median, or it stays that high over two blocks",
    }
    return f"A token is outlying at a block where {high}{more[settings['mark']]}."


def marked_tokens(result: RepairResult) -> list[Compared]:
    """Return how the tokens changed that the original marks at some block; an empty list if it marks none."""
    ever = result.before.ever
    if not bool(ever.any()):
        return []
    sides = (result.before, result.after)
    standing = [side.outlying.any(dim=0) for side in sides]
    cosines = [side.to_inpainted[ever].nan_to_num(0.0).double() for side in sides]
    ratios = [side.ratios.amax(dim=0)[ever] for side in sides]
    count = int(ever.sum())

    def row(name: str, values: list[str], note: str = "") -> Compared:
        return Compared(name, values[0], values[1], note)

    def quantiles(share: float) -> list[str]:
        return [_cosine(each.quantile(share).item()) for each in cosines]

    return [
        row("Still outlying at some block", [f"{int((each & ever).sum()):,} of {count:,}" for each in standing]),
        row("Largest norm ÷ median over the blocks", [_times(_median(each)) for each in ratios], "their median"),
        row("Cosine to the inpainted original, median", quantiles(0.5)),
        row("Cosine to the inpainted original, lowest tenth", quantiles(0.1), "a tenth of them is lower"),
        row(f"With a cosine of {NEAR} or more", [f"{int((each >= NEAR).sum()):,} of {count:,}" for each in cosines]),
        row(
            "Other tokens that are outlying",
            [f"{int((each & ~ever).sum()):,} of {ever.numel() - count:,}" for each in standing],
            "above 0 after a repair: outliers have moved to tokens that were good",
        ),
    ]


def _median(values: Tensor) -> float:
    return float(values.median().item())


def run_facts(result: Recorded) -> list[Named]:
    """Return how long the repair took, why it stopped, what it was judged on and what it changed."""
    summary = result.summary
    skipped = [
        f" ({counted(summary[key], noun)} skipped)" if summary[key] else ""
        for key, noun in (("skipped_steps", "step"), ("skipped_images", "image"))
    ]
    scan = summary["scan"]
    kept = summary["steps"] if result.config["settings"]["keep"] == "last" else summary["best_step"]
    return [
        Named("Recipe", recipe_words(result.config["settings"])),
        Named("Steps", f"{summary['steps']:,}{skipped[0]}"),
        Named("State that is kept", "the original" if kept is None else f"after step {kept:,}"),
        Named("Stopped by", stop_reason(result)),
        Named("Images in the scan", f"{scan['images']:,}, {scan['defective_images']:,} with an outlying token"),
        Named("Images seen in steps", f"{summary['images']:,}{skipped[1]}"),
        Named("Judged on", guard_images(summary)),
        Named("Time", duration(summary["seconds"])),
        Named("Weights changed", f"{summary['changed_weights']:,}"),
        Named("Singular values changed", f"{summary['trained_values']:,}"),
    ]


def recipe_words(settings: dict[str, Any]) -> str:
    """Return the name of the recipe, and those of its values that were set differently."""
    plain = RepairSettings.model_validate({"recipe": settings["recipe"]})
    names = dict.fromkeys(name for values in RECIPES.values() for name in values)
    others = [f"{name} {settings[name]}" for name in names if settings[name] != getattr(plain, name)]
    return str(settings["recipe"]) + (f", with {', '.join(others)}" if others else "")


def stop_reason(result: Recorded) -> str:
    """Return in words why no further step was taken."""
    summary, settings = result.summary, result.config["settings"]
    greedy = settings["step"] == "greedy"
    share = f"{percent(summary['clean_fraction'])} of the latest images without a defect"
    share += " that a step can help" if greedy else ""
    goal = percent(settings["stop_clean_fraction"])
    stopped = str(summary["stopped_by"])
    words = {
        "healthy": "nothing to repair: no image has an outlying token",
        "nothing_marked": "the rule in force marks none of the tokens that stand out",
        "clean": "no outlying token is left on the images that the repair is judged on",
        "fidelity": "cls or good tokens were spoilt, in several evaluations in a row",
        "no_improvement": "no better state in many evaluations in a row",
        "no_gain": (f"no step left has a gain of {number(settings['min_gain'])}: " if greedy else "")
        + f"{share} (goal: {goal})",
        "max_steps": f"the step limit of {settings['max_steps']:,}, with {share} (goal: {goal})",
    }
    return words.get(stopped, stopped)


def setting_facts(result: Recorded) -> list[Named]:
    """Return the settings in force, each with its help text."""
    return setting_rows(RepairSettings, result.config["settings"])


def image_words(result: Recorded) -> str:
    """Return how many images were given, and how many were drawn by the program."""
    images = result.config["images"]
    count, given = images["count"], images["given"]
    if given == count:
        return counted(count, "image")
    if not given:
        return f"{counted(count, 'image')}, all drawn by the program"
    return f"{counted(count, 'image')}: {given:,} given, {count - given:,} drawn by the program"


def origin_facts(result: RepairResult) -> list[Named]:
    """Return the model, the images and the program that this result comes from."""
    config = result.config
    return [
        Named("Model", public_model(result.model)),
        Named("Weights", public_source(str(config["weights"]["source"]))),
        Named("Fingerprint of the weights", str(config["weights"]["fingerprint"])),
        Named("Images", image_words(result)),
        Named("Fingerprint of the images", str(config["images"]["fingerprint"])),
        Named("Device", str(config["device"])),
        *(Named(f"{name} version", str(version)) for name, version in config["versions"].items()),
    ]
