"""What a plugin author imports: documented, typed and versioned."""

from __future__ import annotations

import inspect
import re
from importlib.resources import files

import pytest

import sinder_cli

RECORDS = [name for name in sinder_cli.__all__ if inspect.isclass(getattr(sinder_cli, name))]
FUNCTIONS = [name for name in sinder_cli.__all__ if inspect.isfunction(getattr(sinder_cli, name))]


def test_the_version_of_the_contract_is_a_number() -> None:
    assert sinder_cli.SINDER_API == 1
    assert files("sinder_cli").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", [*RECORDS, *FUNCTIONS])
def test_every_class_and_function_has_a_docstring_of_its_own(name: str) -> None:
    exported = getattr(sinder_cli, name)
    written = exported.__doc__ or ""
    generated = f"{name}("  # how a dataclass documents itself
    assert len(written.split()) >= 5
    assert not written.startswith(generated)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_typed(name: str) -> None:
    signature = inspect.signature(getattr(sinder_cli, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


def test_the_module_tells_of_every_hook() -> None:
    from sinder_cli.backbone import hooks as contract

    hooks = [name for name in vars(contract) if name.startswith("sinder_")]
    assert len(hooks) == 3
    assert all(f"    {name}(" in (sinder_cli.__doc__ or "") for name in hooks)


PLAIN = {"name", "patch_size", "has_cls", "mean", "std"}  # which say all there is to say


@pytest.mark.parametrize("field", sorted(set(sinder_cli.Backbone.__dataclass_fields__) - PLAIN))
def test_every_field_of_a_backbone_is_told_of(field: str) -> None:
    commented = rf"^    {field}: .*  # ."
    told = rf"`{field}(`|\()"
    assert re.search(f"{told}|{commented}", inspect.getsource(sinder_cli.Backbone), re.MULTILINE)
