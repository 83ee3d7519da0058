"""Finding the pretrained file of a model where timm says it is: on the Hugging Face hub, at an address, on disk."""

from __future__ import annotations

from pathlib import Path

import timm

from sinder_cli import ModelRequest, UnavailableError, download

HUB_FILE = "pytorch_model.bin"  # that timm means where it names none
SAFE_NAMES = {HUB_FILE: "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}


def pretrained_file(name: str, request: ModelRequest) -> Path:
    """The pretrained file of a model, fetched once into its cache. Raises `UnavailableError` that says what to do."""
    cfg = timm.get_pretrained_cfg(name) if timm.models.is_model_pretrained(name) else None
    if cfg is None or not cfg.has_weights:
        tags = timm.list_models(f"{name}.*", pretrained=True)[:3]
        remedy = f"name {' or '.join(f'timm/{tag}' for tag in tags)}" if tags else "name a file with --weights"
        raise UnavailableError(f"no weights for timm/{name}", "timm knows none of this name", remedy)
    if cfg.file:
        return Path(cfg.file)
    if cfg.hf_hub_id:
        return hub_file(cfg.hf_hub_id, cfg.hf_hub_filename or HUB_FILE, request.revision)
    return download(cfg.url if isinstance(cfg.url, str) else cfg.url[0], request.emit)


def hub_file(repository: str, filename: str, revision: str | None = None) -> Path:
    """A file of a repository on the hub in its cache, or its twin in safetensors where there is one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    repository, _, pinned = repository.partition("@")

    def fetched(name: str) -> Path:
        return Path(hf_hub_download(repository, name, revision=revision or pinned or None))

    try:
        try:
            return fetched(safe_name(filename))
        except EntryNotFoundError:  # it is not there, or not in the cache and the hub cannot be reached
            return fetched(filename)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, ConnectionError) as error:
        why = " ".join(str(error).split("\n")[0].split()).rstrip(".") or type(error).__name__
        remedy = f"fetch {safe_name(filename)} elsewhere and give it with --weights"
        raise UnavailableError(f"cannot fetch {repository} from the hub", why, remedy) from error


def safe_name(filename: str) -> str:
    """The name that a pickled file of the hub has as safetensors."""
    return SAFE_NAMES.get(filename) or str(Path(filename).with_suffix(".safetensors"))
