"""Download of an official checkpoint, once, into the cache that torch.hub uses too."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError

from sinder_cli.errors import SinderError, UnavailableError
from sinder_cli.events import Advanced, Emit, Finished, Noted, Started
from sinder_cli.files import replacing, require_writable_folder, write_text

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60


def hub_cache() -> Path:
    """Return torch hub's folder for checkpoints, found without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser() / "hub" / "checkpoints"


def download(url: str, emit: Emit) -> Path:
    """Return the cached file of `url`, downloading it if it is not there yet.

    The SHA-256 of the downloaded file is written beside it to `NAME.sha256`. An interrupted or short download leaves no
    file under the final name. Raises `UnavailableError`, which says what to fetch and where to put it.
    """
    target = hub_cache() / url.rsplit("/", 1)[1]
    if target.is_file():
        return target
    phase = f"downloading {target.name}"
    try:
        require_writable_folder(target.parent)
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, replacing(target) as temporary:
            expected = int(response.headers.get("Content-Length") or 0)
            digest = hashlib.sha256()
            received = 0
            emit(Started(phase, expected or None, "B"))
            with temporary.open("wb") as file:
                for chunk in _chunks(response, url, target):
                    file.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
                    emit(Advanced(phase, len(chunk)))
            if expected and received != expected:
                raise _unreachable(url, target, f"the connection broke after {received} of {expected} bytes")
    except SinderError:
        raise
    except HTTPError as error:
        error.close()  # the error holds the server's response, with an open connection
        raise _unreachable(url, target, str(error)) from error
    except (OSError, HTTPException) as error:
        raise _unreachable(url, target, _reason(error)) from error
    finally:
        emit(Finished(phase))
    write_text(target.with_name(f"{target.name}.sha256"), f"{digest.hexdigest()}  {target.name}\n")
    emit(Noted(f"{target.name}: {received} bytes, sha256 {digest.hexdigest()}"))
    return target


def _chunks(response: HTTPResponse, url: str, target: Path) -> Iterator[bytes]:
    """Yield the body in pieces; raise a broken connection as `UnavailableError`, distinct from a failed write."""
    try:
        while chunk := response.read(CHUNK_BYTES):
            yield chunk
    except (OSError, HTTPException) as error:
        raise _unreachable(url, target, f"the connection broke: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error) or type(error).__name__


def _unreachable(url: str, target: Path, why: str) -> UnavailableError:
    return UnavailableError(
        f"cannot download {url}", why, f"fetch it elsewhere and put it at {target}, or give --weights"
    )
