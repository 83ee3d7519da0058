"""Pictures of every format that Pillow writes: cut off, with other bytes, and with sizes that lie."""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Callable
from pathlib import Path

from fuzz_harness import Case, damaged, require_ours
from PIL import Image, features

from sinder_cli.images.decoding import decode

FILES = 6  # random cases of each format, a round
MODES = ("RGB", "L", "P", "1", "RGBA")


def pictures() -> dict[str, bytes]:
    """A small picture in every format, in the first mode that the format holds."""
    Image.init()
    drawn = Image.linear_gradient("L").resize((60, 44)).convert("RGB")
    found: dict[str, bytes] = {}
    for name in sorted(Image.SAVE):
        if name == "AVIF" and not features.check("avif"):
            continue
        for mode in MODES:
            file = io.BytesIO()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # some formats are deprecated
                    drawn.convert(mode).save(file, name)
            except (OSError, ValueError, KeyError, AttributeError):  # not this mode, or a stub without a writer
                continue
            found[name] = file.getvalue()
            break
    return found


def decoded(path: Path, content: bytes) -> Callable[[], object]:
    def run() -> object:
        path.write_bytes(content)
        return decode(path)

    return run


def test_a_picture_of_any_format_cut_off_or_lying(tmp_path: Path) -> None:
    cases = []
    for name, content in pictures().items():
        path = tmp_path / f"picture.{name.lower()}"
        cases.append(Case(f"{name}, whole", decoded(path, content)))
        for share in (0.0, 0.05, 0.3, 0.9, 0.99):
            cut = content[: int(share * len(content))]
            cases.append(Case(f"{name}, {share:.0%} of it", decoded(path, cut)))
        for width in (2, 4):
            for order in ("little", "big"):
                was = (60).to_bytes(width, order)  # type: ignore[arg-type]
                for size in (0, 256**width // 2 - 1, 256**width - 1):
                    lying = content.replace(was, size.to_bytes(width, order), 1)  # type: ignore[arg-type]
                    cases.append(Case(f"{name}, {size} wide, {width} bytes, {order}", decoded(path, lying)))
    assert len(pictures()) >= 15
    require_ours(cases, least_refused=0.3)


def test_a_picture_of_any_format_with_other_bytes(tmp_path: Path, rounds: range) -> None:
    cases = []
    for number in rounds:
        for name, content in pictures().items():
            for index in range(FILES):
                draw = random.Random(f"{name} {number} {index}")
                data = damaged(content, draw, draw.choice((32, 300, len(content))))
                cases.append(Case(f"{name}, round {number}, {index}", decoded(tmp_path / f"a.{name.lower()}", data)))
    require_ours(cases, least_refused=0.2)
