"""The documentation as a site: strict, whole, searchable from a disk, and nothing in it comes from elsewhere."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from headless import FLAGS, browser

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
from mkdocs.exceptions import PluginError

import sinder_cli

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import checks  # noqa: E402

pytestmark = pytest.mark.slow
SEARCH = """<body><iframe src="index.html" style="width:1200px;height:900px"></iframe><script>
onload = async () => {
  const page = frames[0].document, field = page.querySelector(".md-search__input");
  field.focus();
  field.value = "inpainted";
  for (const name of ["focus", "input", "keyup"]) field.dispatchEvent(new frames[0].Event(name, {bubbles: true}));
  let found = [];
  for (let waited = 0; waited < 200 && !found.length; waited++) {
    await new Promise(done => setTimeout(done, 50));
    found = [...page.querySelectorAll(".md-search-result__link")].map(link => link.getAttribute("href"));
  }
  const loaded = frames[0].performance.getEntriesByType("resource").map(entry => entry.name);
  document.title = JSON.stringify({found, outside: loaded.filter(name => !/^(file|data):/.test(name))});
}
</script>"""


def build(folder: Path, *arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # not --quiet, with which warnings are not counted, and nothing is strict
    command = [
        sys.executable,
        "-W",
        "default",
        "-m",
        "mkdocs",
        "build",
        "--site-dir",
        str(folder),
        *arguments,
    ]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert len(pages) >= 20
    assert pages <= {path.stem for path in site.glob("*.html")}


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    for path in site.glob("*.html"):
        page = path.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?([^\"' >]+)", page)
        tags += re.findall(r"<link\b[^>]*\bhref=[\"']?([^\"' >]+)", page)
        assert [tag for tag in tags if re.match(r"(https?:)?//", tag)] == [], path.name


def test_a_broken_link_ends_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("[gone](gone.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nstrict: true\nvalidation: {unrecognized_links: warn}\n")
    assert build(tmp_path / "site", root=tmp_path).returncode != 0
    assert "strict: true" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_a_public_name_without_words_ends_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    checks.on_pre_build(None)

    def bare() -> None: ...

    monkeypatch.setattr(sinder_cli, "look", bare)
    with pytest.raises(PluginError, match=r"without a docstring: \['look'\]"):
        checks.on_pre_build(None)


def test_a_public_name_that_the_reference_lacks_ends_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shortened = tmp_path / "api.md"
    shortened.write_text(checks.REFERENCE.read_text(encoding="utf-8").replace("StemMap", ""))
    monkeypatch.setattr(checks, "REFERENCE", shortened)
    with pytest.raises(PluginError, match=r"not in docs/api\.md: \['StemMap'\]"):
        checks.on_pre_build(None)


def test_the_search_works_from_a_disk_and_asks_nobody(site: Path, tmp_path: Path) -> None:
    program = browser()
    if program is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    (site / "search.html").write_text(SEARCH, encoding="utf-8")
    command = [program, *FLAGS, "--virtual-time-budget=60000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (site / "search.html").as_uri()], capture_output=True, text=True, timeout=180, check=True
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stdout[:2000] + done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(html.unescape(title[1]))
    assert any("repair.html" in link or "mathematics.html" in link for link in seen["found"])
    assert seen["outside"] == []
