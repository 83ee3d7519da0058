"""The lowest versions that pyproject.toml allows, as constraints for pip: `make test-lowest`.

Of every requirement of the package and of its extras but `test`; what they need in turn is pip's choice.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def lowest(project: dict[str, object]) -> list[str]:
    """`name==version` for each requirement `name>=version`, with the marker of its environment."""
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    required = [*project["dependencies"], *(each for name, found in extras.items() if name != "test" for each in found)]
    pattern = re.compile(r"(?P<name>[\w.-]+)>=(?P<version>[\w.]+)(?P<marker>\s*;.*)?")
    found = [pattern.fullmatch(each) for each in required]
    return sorted(f"{each['name']}=={each['version']}{each['marker'] or ''}" for each in found if each)


if __name__ == "__main__":
    print("\n".join(lowest(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])))
