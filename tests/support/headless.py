"""A page in a headless browser, at an exact width: what it shows, loads and complains about."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--allow-file-access-from-files",  # or the frame cannot be measured
)
HEIGHT = 3000
# A headless window is never narrower than about 500 pixels; a frame is.
FRAME = """<body style="margin:0"><iframe src="page.html" style="border:0;width:WIDTHpx;height:HEIGHTpx"></iframe>
<script>
onload = () => {
  const frame = frames[0], root = frame.document.documentElement;
  const hidden = [...frame.document.querySelectorAll("img, svg")].filter(element => {
    const box = element.getBoundingClientRect();
    const drawn = element.tagName != "IMG" || element.naturalWidth > 0;
    return !(drawn && box.width > 4 && box.height > 4 && box.left >= 0 && box.right <= root.clientWidth + 0.5);
  });
  document.title = JSON.stringify({
    width: root.clientWidth,
    overflow: root.scrollWidth - root.clientWidth,
    figures: frame.document.querySelectorAll("img, svg").length,
    hidden: hidden.map(element => element.outerHTML.slice(0, 200)),
    loaded: frame.performance.getEntriesByType("resource").map(entry => entry.name),
  });
}
</script>"""


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page; `console` holds what it complained about."""

    width: int
    overflow: int
    figures: int
    hidden: list[str]
    loaded: list[str]
    console: list[str]
    picture: Path


def browser() -> str | None:
    """The first browser that is installed."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


def look(program: str, page: str, width: int, folder: Path) -> Seen:
    """Open `page` in a frame of `width` pixels."""
    (folder / "page.html").write_text(page, "utf-8")
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)).replace("HEIGHT", str(HEIGHT)), "utf-8")
    picture = folder / f"shot-{width}.png"
    done = [
        _run(program, folder / f"profile-{width}-{number}", width, task, folder / "frame.html")
        for number, task in enumerate((f"--screenshot={picture}", "--dump-dom"))
    ]
    title = re.search(r"<title>(.*?)</title>", done[1].stdout, re.DOTALL)
    assert title is not None, done[1].stdout[:2000] + done[1].stderr[-2000:]
    measured: dict[str, Any] = json.loads(html.unescape(title[1]))
    console = [line for run in done for line in run.stderr.splitlines() if "CONSOLE" in line]
    return Seen(**measured, console=console, picture=picture)


def _run(program: str, profile: Path, width: int, task: str, page: Path) -> subprocess.CompletedProcess[str]:
    size = f"--window-size={max(width, 500)},{HEIGHT}"
    command = [program, *FLAGS, f"--user-data-dir={profile}", size, task, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)


def printed(program: str, page: str, scheme: str, folder: Path) -> bytes:
    """The page as a PDF, as the browser's own print command makes it."""
    (folder / "printed.html").write_text(page, "utf-8")
    pdf = folder / "printed.pdf"
    profile = folder / f"printing-{scheme[-1]}"
    command = [program, *FLAGS, scheme, f"--user-data-dir={profile}", "--no-pdf-header-footer", f"--print-to-pdf={pdf}"]
    subprocess.run([*command, (folder / "printed.html").as_uri()], capture_output=True, timeout=180, check=True)
    return pdf.read_bytes()


def unpacked(pdf: bytes) -> bytes:
    """The streams of a PDF that are compressed, one after the other."""
    found = []
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        with suppress(zlib.error):
            found.append(zlib.decompress(stream))
    return b"\n".join(found)


AUDIT = """<body style="margin:0"><iframe src="audited.html" style="border:0;width:1200px;height:HEIGHTpx"></iframe>
<script>
onload = async () => {
  const frame = frames[0];
  const found = await frame.axe.run(frame.document, {runOnly: ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]});
  document.title = JSON.stringify({
    passed: found.passes.length,
    dark: frame.matchMedia("(prefers-color-scheme: dark)").matches,
    violations: found.violations.flatMap(each => each.nodes.map(
      node => `${each.id}: ${each.help}: ${node.html.slice(0, 160)} ${node.failureSummary.slice(0, 200)}`)),
  });
}
</script>"""
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')  # forbids the audit's script, too
DARK, LIGHT = "--blink-settings=preferredColorScheme=0", "--blink-settings=preferredColorScheme=1"


def audit(program: str, page: str, scheme: str, folder: Path) -> dict[str, Any]:
    """What axe-core finds wrong with a page, in light or dark: contrast, names, order of headings, landmarks."""
    import axe_core_python

    (folder / "axe.js").write_text(Path(axe_core_python.__file__).with_name("axe.min.js").read_text("utf-8"), "utf-8")
    scripted = POLICY.sub("", page).replace("<head>", '<head><script src="axe.js"></script>', 1)
    assert scripted != page
    (folder / "audited.html").write_text(scripted, "utf-8")
    (folder / "audit.html").write_text(AUDIT.replace("HEIGHT", str(HEIGHT)), "utf-8")
    profile = folder / f"audit-{scheme[-1]}"
    command = [program, *FLAGS, scheme, "--virtual-time-budget=60000", f"--user-data-dir={profile}", "--dump-dom"]
    done = subprocess.run(
        [*command, (folder / "audit.html").as_uri()], capture_output=True, text=True, timeout=180, check=True
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stdout[:2000] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    return found
