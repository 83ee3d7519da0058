"""Whether two `config.json` are of the same run: what would change its result if they are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sinder_cli.repair.settings import WITHOUT_EFFECT


def differences(stored: dict[str, Any], given: dict[str, Any], images: bool = True) -> Iterator[tuple[str, Any, Any]]:
    """What of two `config.json` of one shape would change the result: name, stored value, given value.

    `images`: by their count and fingerprint, where there is no list of them.
    """
    for name in ("model", "heads", "revision", "attention"):
        if stored[name] != given[name]:
            yield name, stored[name], given[name]
    was, now = (str(config["device"]).partition(":")[0] for config in (stored, given))
    if was != now:
        yield "device", was, now
    for name, kind in (("weights", "fingerprint"), ("images", "count"), ("images", "fingerprint")):
        if (images or name != "images") and stored[name][kind] != given[name][kind]:
            yield f"{kind} of the {name}", stored[name][kind], given[name][kind]
    for name, now in given["settings"].items():
        if name not in WITHOUT_EFFECT and stored["settings"][name] != now:
            yield f"setting {name}", stored["settings"][name], now


def is_of_a_run(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is ours: the folders of Hugging Face models have one too."""
    return {"model", "weights", "images", "settings", "versions"} <= config.keys()


def names_in(document: Any) -> Any:
    """The names in a JSON document, without the values."""
    return {name: names_in(part) for name, part in document.items()} if isinstance(document, dict) else None
