"""The module as Python files that need nothing but torch, for those who load it by `torch.hub`."""

from __future__ import annotations

from importlib.resources import files

from .config import Config

MODEL = """from torch.nn.functional import scaled_dot_product_attention

from .config import Config
from .module import VisionTransformer


def build():
    config = {config!r}
    return VisionTransformer(config, {heads}, scaled_dot_product_attention)
"""


def hub_source(config: Config, heads: int) -> dict[str, str]:
    """The module's own two files, and one that builds it with these sizes."""
    own = {name: files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("config.py", "module.py")}
    return own | {"model.py": MODEL.format(config=config, heads=heads)}
