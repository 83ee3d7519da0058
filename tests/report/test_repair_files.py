"""What a repair leaves for people: page, card, and pictures as files."""

from __future__ import annotations

import json
from collections.abc import Callable

from PIL import Image

from sinder_cli.repairing.folder import RunFolder
from sinder_cli.repairing.results import RepairResult
from sinder_cli.report.repair.page import write_repair
from sinder_cli.report.repair.pictures import WORDS, read_pictures

MakeResult = Callable[..., RepairResult]


def test_page_card_and_pictures_are_written_and_written_anew(make_result: MakeResult) -> None:
    result = make_result()
    folder = RunFolder(result.folder)
    folder.pictures.mkdir()
    (folder.pictures / "of-an-earlier-run.png").write_bytes(b"")
    write_repair(folder, result)
    assert folder.report.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert folder.card.read_text(encoding="utf-8").startswith("---")
    names = sorted(path.name for path in folder.pictures.iterdir())
    assert names == sorted([WORDS, *json.loads((folder.pictures / WORDS).read_text(encoding="utf-8"))])
    assert {"image.jpg", "pca-before.png", "pca-after.png", "fidelity-after.png"} <= set(names)
    for picture in read_pictures(folder.pictures):
        assert picture.words
        Image.open(folder.pictures / picture.name).verify()


def test_unchanged_weights_have_one_picture_of_each_kind(make_result: MakeResult) -> None:
    result = make_result(before=0, changed=0, steps=0, stopped_by="healthy")
    write_repair(RunFolder(result.folder), result)
    names = {path.name for path in RunFolder(result.folder).pictures.iterdir()}
    assert "pca-original.png" in names
    assert not any("after" in name for name in names)
