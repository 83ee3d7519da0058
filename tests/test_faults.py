"""What is wrong with a value is said in words of ours, whatever pydantic finds: all kinds of a repair's settings."""

from __future__ import annotations

import math
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from sinder_cli.analysis.settings import AnalyzeSettings
from sinder_cli.backbone.contract import BlockMap, LayerMap, NormMap, WeightRef
from sinder_cli.defects.settings import DetectionSettings, read_settings
from sinder_cli.errors import NoInputError, UsageError
from sinder_cli.faults import WANTED, first_fault, quoted
from sinder_cli.repairing.settings import RepairSettings

PYDANTICS = re.compile(r"[Ii]nput|Extra|pattern|valid |unable|instance|literal|parse|schema|pydantic|Value error")
VALUES: list[Any] = [
    None, True, -1, 0, 1, 2.5, -1e308, 10**30, 10**5000, float("nan"), float("inf"), "", "x", "²", "9" * 5000,
    "\x1b[31m", [], [1], ["x"], [[]], {}, {"a": 1}, date(2026, 1, 1),
]  # fmt: skip


def refusal_of(kind: type[DetectionSettings], settings: dict[str, Any]) -> UsageError | None:
    try:
        read_settings(kind, settings)
    except UsageError as error:
        return error
    return None


@pytest.mark.parametrize("kind", [RepairSettings, AnalyzeSettings, DetectionSettings])
def test_no_value_of_any_setting_brings_out_another_librarys_words(kind: type[DetectionSettings]) -> None:
    names = [*kind.model_fields, "no such"]
    refusals = [error for name in names for value in VALUES if (error := refusal_of(kind, {name: value}))]
    assert len(refusals) > 10 * len(names)
    for error in refusals:
        assert not PYDANTICS.search(error.why), error
        assert len(str(error)) < 250, error
        assert str(error).isprintable()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 100}, "bad setting 'lr': it must be 10 or less, not 100"),
        ({"lr": 0}, "bad setting 'lr': it must be above 0, not 0"),
        ({"lr": "many"}, "bad setting 'lr': it must be a number, not 'many'"),
        ({"batch_size": 1.5}, "bad setting 'batch_size': it must be a whole number, not 1.5"),
        ({"tf32": "perhaps"}, "bad setting 'tf32': it must be true or false, not 'perhaps'"),
        ({"kernel": 4}, "bad setting 'kernel': it must be 3 or 5, not 4"),
        ({"device": "tpu"}, "bad setting 'device': it must be auto, cpu, cuda, cuda:N or mps, not 'tpu'"),
        ({"log": {"a": 1}}, "bad setting 'log': it must be a list, not a table"),
        ({"recipe": ["paper"]}, "bad setting 'recipe': it must be 'sinder', 'polyak' or 'paper', not a list"),
        ({"min_fidelty": 1}, "bad setting 'min_fidelty': this name is unknown: did you mean min_fidelity?"),
        ({"learning_rate": 1}, "bad setting 'learning_rate': this name is unknown"),
        ({"norm_factor": 0, "mark": "norm"}, "settings contradict each other: mark norm needs a norm_factor above 0"),
    ],
)
def test_a_setting_is_refused_with_what_it_must_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        read_settings(RepairSettings, settings)
    assert str(refusal.value) == f"{words}; --help-all lists the settings"


@pytest.mark.parametrize(
    ("name", "fine", "refused"),
    [
        ("norm_factor", [0, 1e-9, 1e9], [-1e-9, math.inf]),
        ("mask_threshold", [1e-9, 1e9], [0, math.nan]),
        ("min_gap", [0, 1e-9, 1e9], [-1e-9]),
        ("min_tokens", [1, 10**9], [0, 10**9 + 1]),
        ("image_size", [None, 1, 10**9], [0, 10**9 + 1]),
        ("batch_size", [1, 10**9], [0, 10**9 + 1]),
        ("kernel", [3, 5], [2, 4, 6]),
        ("seed", [0, 2**63 - 1], [-1, 2**63]),
        ("workers", [None, 0, 64], [-1, 65]),
        ("device", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:999"], ["", "cuda:", "cuda:1000", "cpu:0", "a cpu"]),
    ],
)
def test_a_setting_takes_its_limits_and_nothing_beyond(name: str, fine: list[Any], refused: list[Any]) -> None:
    for value in fine:
        assert getattr(read_settings(DetectionSettings, {name: value}), name) == value
    for value in refused:
        assert refusal_of(DetectionSettings, {name: value}), value


def test_settings_have_the_defaults_that_are_documented() -> None:
    settings = DetectionSettings()
    assert settings.model_dump() == {
        "mark": "auto", "norm_factor": 3.0, "mask_threshold": 4.0, "min_tokens": 3, "min_gap": 1.1, "kernel": 3,
        "image_size": None, "batch_size": 1, "dtype": "float32", "tf32": False, "device": "auto", "seed": 0,
        "workers": None, "figure_formats": (),
    }  # fmt: skip
    with pytest.raises(ValidationError):
        settings.seed = 1  # type: ignore[misc]


def test_a_setting_of_the_call_goes_before_that_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('device = "cpu"\nseed = 5\n')
    found = read_settings(DetectionSettings, {"seed": 6}, file)
    assert (found.device, found.seed) == ("cpu", 6)
    file.write_text("seed = -1\n")
    for given, place in (({}, f" in {file}"), ({"workers": 0}, f" in {file}"), ({"seed": -2}, "")):
        with pytest.raises(UsageError) as refusal:
            read_settings(DetectionSettings, given, file)
        assert refusal.value.what == f"bad setting 'seed'{place}"


def test_a_settings_file_that_is_missing_has_its_own_exit_code(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match=r"cannot read settings .*none\.toml: No such file or directory"):
        read_settings(DetectionSettings, {}, tmp_path / "none.toml")


@pytest.mark.parametrize(
    "text", ["x = " + "[" * 5000, "seed = " + "9" * 5000, "seed = 1\x00", "= 1", "\ufeffseed = 1", "a.b.c = 1\na.b = 2"]
)
def test_a_settings_file_that_is_no_toml_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"cannot read settings .*settings\.toml: .*; it must be TOML"):
        read_settings(RepairSettings, {}, file)


def test_a_plugins_layer_map_is_refused_in_our_words() -> None:
    norm = NormMap(weight=WeightRef(name="a"), eps=1e-5)
    made: list[tuple[type[BaseModel], dict[str, Any]]] = [
        (NormMap, {"weight": 5}),
        (NormMap, {"weight": WeightRef(name="a"), "eps": "small"}),
        (WeightRef, {}),
        (WeightRef, {"name": "a", "rows": (1, 2, 3)}),
        (BlockMap, {"attention": norm, "mlp": norm}),
        (LayerMap, {"width": "wide", "blocks": ()}),
        (LayerMap, {"width": 4, "blocks": (), "colour": 1}),
    ]
    for kind, values in made:
        with pytest.raises(ValidationError) as refusal:
            kind(**values)
        place, why = first_fault(refusal.value)
        assert place
        assert not PYDANTICS.search(why), why


def test_a_kind_of_error_without_words_quotes_the_value() -> None:
    class Strict(BaseModel):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        at: date

    with pytest.raises(ValidationError) as refusal:
        Strict(at="soon")  # type: ignore[arg-type]
    assert refusal.value.errors()[0]["type"] not in WANTED
    assert first_fault(refusal.value) == (("at",), "'soon' does not fit")


def test_a_long_value_is_cut_and_control_characters_are_escaped() -> None:
    assert quoted("a" * 100) == "'" + "a" * 38 + "…"
    assert quoted("\x1b[31m") == "'\\x1b[31m'"
    assert quoted(10**5000) == "a number of 16610 bits"
