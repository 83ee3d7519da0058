"""A torchvision without its compiled operators can be imported, and one that works is left alone."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from sinder_cli.backbone.torchvision_shim import SCHEMAS

DEFINE = "from sinder_cli import define_torchvision_operators as define\n"
needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")


def run(script: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", DEFINE + script], check=True, timeout=120)


@needs_torchvision
def test_torchvision_is_imported_whether_its_operators_work_or_not() -> None:
    run("define(); import torchvision.transforms")


@needs_torchvision
def test_operators_that_exist_are_not_defined_again() -> None:
    schemas = [f"{name}{schema}" for name, schema in SCHEMAS.items()]
    run(f"""
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
for schema in {schemas}:
    name = schema.split("(")[0]
    if not hasattr(torch.ops.torchvision, name):
        library.define(schema)
assert define() is None
""")


@needs_torchvision
def test_defining_twice_is_defining_once() -> None:
    run("assert define() is define()")


def test_without_torchvision_nothing_happens_and_torch_is_not_imported() -> None:
    run("import sys; sys.modules['torchvision'] = None; assert define() is None; assert 'torch' not in sys.modules")
