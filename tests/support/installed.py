"""Plugins as an installer leaves them."""

from __future__ import annotations

from pathlib import Path


def install(folder: Path, distribution: str, plugin: str, text: str) -> None:
    """Lay out a distribution of one module with an entry point, as an installer leaves it."""
    module = f"{distribution.replace('-', '_')}_module"
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sinder.backbones]\n{plugin} = {module}\n")
    (folder / f"{module}.py").write_text(text.replace("{module}", module).replace("{name}", plugin))
