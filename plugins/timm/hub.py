"""Finding the pretrained file of a model in the place that timm names: the Hugging Face hub, a URL, or the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's, or httpx2's
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
)

from sinder_cli import ModelRequest, UnavailableError, download

HUB_FILE = "pytorch_model.bin"  # timm's default if it names no file
SAFE_NAMES = {HUB_FILE: "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}


def pretrained_file(name: str, request: ModelRequest) -> Path:
    """Return the pretrained file of a model, fetched once into a cache. Raises `UnavailableError` with a remedy."""
    cfg = timm.get_pretrained_cfg(name) if timm.models.is_model_pretrained(name) else None
    if cfg is None or not cfg.has_weights:
        raise UnavailableError(f"no weights for timm/{name}", "timm has none", "name a file with --weights")
    if cfg.file:
        return Path(cfg.file)
    if cfg.hf_hub_id:
        return hub_file(cfg.hf_hub_id, cfg.hf_hub_filename or HUB_FILE, request.revision)
    return download(cfg.url if isinstance(cfg.url, str) else cfg.url[0], request.emit)


def hub_file(repository: str, filename: str, revision: str | None = None) -> Path:
    """Return a file of a hub repository, fetched into the cache; its safetensors version if there is one."""
    repository, _, pinned = repository.partition("@")
    at = {"repo_id": repository, "revision": revision or pinned or None}
    try:
        return _safest(filename, at)
    except LocalEntryNotFoundError as error:
        raise _unreachable(repository, filename, error) from error
    except EntryNotFoundError as error:
        why = f"it has neither {safe_name(filename)} nor {filename}"
        raise UnavailableError(f"cannot use {repository} of the hub", why, "name a file with --weights") from error
    except GatedRepoError as error:
        remedy = f"ask for it at {constants.ENDPOINT}/{repository}, and set HF_TOKEN"
        why = "it is gated, and this token has no access"
        raise UnavailableError(f"cannot use {repository} of the hub", why, remedy) from error
    except (HfHubHTTPError, HTTPError) as error:
        why = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise UnavailableError(f"cannot use {repository} of the hub", why, "check the name and --revision") from error


def _safest(filename: str, at: dict[str, Any]) -> Path:
    """Return the safetensors version of a file, else the file itself; if the hub does not answer, use the cache."""
    try:
        return Path(hf_hub_download(filename=safe_name(filename), **at))
    except LocalEntryNotFoundError:
        cached = try_to_load_from_cache(filename=filename, **at)
        if isinstance(cached, str):
            return Path(cached)
        raise
    except EntryNotFoundError:
        return Path(hf_hub_download(filename=filename, **at))


def safe_name(filename: str) -> str:
    """Return the name of the safetensors version of a pickled file on the hub."""
    return SAFE_NAMES.get(filename) or str(Path(filename).with_suffix(".safetensors"))


def _unreachable(repository: str, filename: str, error: Exception) -> UnavailableError:
    what, remedy = f"cannot fetch {repository}", f"fetch {safe_name(filename)} elsewhere and name it with --weights"
    if constants.HF_HUB_OFFLINE:
        return UnavailableError(what, "offline mode is on, and it is not in the cache", remedy)
    reason = str(error.__cause__ or error).strip().split("\n")[0]
    return UnavailableError(what, f"{constants.ENDPOINT} does not answer ({reason})", remedy)


HELD = (
    "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "pool_size",
    "first_conv", "classifier", "license",
)  # fmt: skip


def hub_config(name: str, module: Any) -> str:
    """Return the text of `config.json` for a model of a name, built without a classifier."""
    architecture, _, tag = name.partition(".")
    cfg = {key: module.pretrained_cfg[key] for key in HELD if module.pretrained_cfg.get(key) is not None}
    cfg |= {"tag": tag, "custom_load": False, "num_classes": 0}
    document = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": module.num_features,
        "global_pool": module.global_pool,
        "pretrained_cfg": cfg,
    }
    return json.dumps(document, indent=2) + "\n"
