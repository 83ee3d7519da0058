"""Tasks of somebody else: the one that the documents show, and ones that break."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sinder_cli.cli.main import main
from sinder_cli.evaluation.registry import installed_tasks

DOCUMENT = Path(__file__).parents[2] / "docs" / "evaluate.md"
(SHOWN,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution with one task, as pip would lay it out."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(name: str, source: str) -> None:
        (tmp_path / f"task_{name}.py").write_text(source, encoding="utf-8")
        metadata = tmp_path / f"sinder_task_{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sinder-task-{name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[sinder.tasks]\n{name} = task_{name}\n")

    yield add
    for module in [name for name in sys.modules if name.startswith("task_")]:
        del sys.modules[module]


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "demo_vit", *arguments, "--resamples", "100", "--format", "json"])
    printed = capsys.readouterr()
    return end.value.code, printed.out, (printed.err.splitlines() or [""])[-1]


@pytest.mark.slow
def test_the_task_of_the_documents_runs(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("spread", SHOWN)
    code, printed, said = evaluated(capsys, "spread", "--limit", "3")
    assert code == 0, said
    assert '"name": "spread"' in printed


def test_the_task_of_the_documents_imports_no_torch() -> None:
    head = SHOWN.split("def ")[0]
    assert re.findall(r"^(?:from|import) (\S+)", head, re.MULTILINE) == ["sinder_cli", "sinder_cli.tasks"]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (("import torch", "raise ValueError('odd')"), 69, "task 'broken' failed: ValueError: odd; tell its author"),
        (("return TASK", "raise OSError('odd')"), 69, "cannot use task 'broken': OSError: odd; tell its author"),
        (("import torch", "open('/nowhere/at/all')"), 69, "task 'broken' failed: FileNotFoundError"),
        (("return TASK", "return 3"), 69, "returned no Task"),
        (("SINDER_API = 1", "import no_such_library"), 69, "cannot load plugin 'broken' of sinder-task-broken: "),
        (("SINDER_API = 1", "SINDER_API = 9"), 69, "it is written for SINDER_API 9, this is 1"),
        (("[None] * len(images)", "[None]"), 69, "images have 1 truths"),
        (("read, views, score)", "read, views, score, requires=('no_such',))"), 69, "it needs no_such, which is not"),
    ],
)
def test_a_task_that_breaks_is_named(
    install: Install, change: tuple[str, str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert change[0] in SHOWN
    install("broken", SHOWN.replace(*change))
    found, printed, said = evaluated(capsys, "broken", "--limit", "2")
    assert found == code
    assert words in said
    assert printed == ""


def test_only_allowed_tasks_of_others_load(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("spread", SHOWN)
    assert {"dense", "knn", "spread"} <= set(installed_tasks())
    monkeypatch.setenv("SINDER_PLUGINS", "demo")
    assert "spread" not in installed_tasks()
    assert "dense" in installed_tasks()
    monkeypatch.setenv("SINDER_PLUGINS", "demo,spread")
    assert "spread" in installed_tasks()
