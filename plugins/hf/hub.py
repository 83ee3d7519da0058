"""The Hugging Face hub: the few files that describe an encoder, and its safetensors, in the hub's own cache.

Pickles are never downloaded. All files are from the same commit, even if the hub changes meanwhile.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's, or httpx2's
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sinder_cli import BadInputError, NoInputError, SinderError, UnavailableError, UsageError, shard_names

from .folder import CONFIG, OPTIONAL

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def download(repository: str, revision: str | None, weights: bool) -> Path:
    """Return the folder of the cache with a repository's text files, and its weights if requested.

    Raises `NoInputError`, `UnavailableError`, `UsageError` or `BadInputError`, which say what is wrong and what to do.
    """
    folder = _fetch(repository, CONFIG, revision).parent
    commit = folder.name
    for name in OPTIONAL:
        _fetch_if_there(repository, name, commit)
    if weights and not _fetch_if_there(repository, SINGLE, commit):
        index = _fetch_if_there(repository, INDEX, commit)
        if index is None:
            raise _without_weights(repository)
        for shard in dict.fromkeys(shard_names(index).values()):
            _fetch(repository, shard, commit)
    return folder


def _fetch(repository: str, name: str, revision: str | None) -> Path:
    """Return one file in the cache. Raises a `SinderError` of one line for any failure."""
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise _unreachable(repository, name, error) from error
        raise NoInputError(f"cannot use {repository}", f"the hub has no {name} for it", "name another") from error
    except (HfHubHTTPError, HFValidationError, HTTPError) as error:
        raise _refused(repository, revision, error) from error


def _fetch_if_there(repository: str, name: str, commit: str) -> Path | None:
    """Return one file in the cache; None if the repository is known to lack it, or, in offline mode, if not cached."""
    try:
        return _fetch(repository, name, commit)
    except NoInputError:
        return None
    except UnavailableError:
        known_absent = not isinstance(try_to_load_from_cache(repository, name, revision=commit), str | None)
        if constants.HF_HUB_OFFLINE or known_absent:
            return None
        raise


def _refused(repository: str, revision: str | None, error: Exception) -> SinderError:
    what = f"cannot use {repository}"
    if isinstance(error, GatedRepoError):
        remedy = f"ask for it at {constants.ENDPOINT}/{repository}, and set HF_TOKEN"
        return UnavailableError(what, "it is gated, and this token has no access", remedy)
    if isinstance(error, RepositoryNotFoundError):
        why = "the hub has no such repository, or it is private"
        return NoInputError(what, why, "check the name, or set HF_TOKEN; a folder is named hf/./FOLDER")
    if isinstance(error, RevisionNotFoundError):
        return NoInputError(what, f"it has no revision {revision!r}", "check --revision")
    if isinstance(error, HFValidationError):
        return UsageError(what, str(error), "name it OWNER/NAME")
    return UnavailableError(what, str(error).strip().split("\n")[0] or type(error).__name__, "try again later")


def _unreachable(repository: str, name: str, error: Exception) -> UnavailableError:
    what = f"cannot fetch {name} of {repository}"
    if constants.HF_HUB_OFFLINE:
        why = "offline mode is on, and it is not in the cache"
        return UnavailableError(what, why, "run once without HF_HUB_OFFLINE, or name a folder as hf/./FOLDER")
    reason = str(error.__cause__ or error).strip().split("\n")[0]
    remedy = "check the network and run again, or name a folder as hf/./FOLDER"
    return UnavailableError(
        what, f"{constants.ENDPOINT} does not answer ({reason}), and it is not in the cache", remedy
    )


def _without_weights(repository: str) -> SinderError:
    if constants.HF_HUB_OFFLINE:
        return _unreachable(repository, SINGLE, FileNotFoundError())
    why = f"it has neither {SINGLE} nor {INDEX}, and pickles are never opened"
    return BadInputError(
        f"cannot use {repository}", why, "convert it to safetensors, or name a --revision that has them"
    )
