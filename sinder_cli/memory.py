"""Memory: the peak use so far, and recognition of the many errors by which libraries report lack of memory."""

from __future__ import annotations

import errno
import resource
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from sinder_cli.errors import TryAgainError

SIGNS = (  # in the message of a RuntimeError, from torch's allocators, cuBLAS, the C++ library, threading, oneDNN
    "allocate memory",
    "out of memory",
    "ALLOC_FAILED",
    "bad_alloc",
    "can't start new thread",
    "could not create a primitive",  # under RLIMIT_AS
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an exception means that there was not enough memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one
        return any(sign in str(error) for sign in SIGNS)
    return isinstance(error, MemoryError)


def peak_memory(device: str = "cpu") -> int:
    """Return the peak number of bytes so far: allocated on a CUDA device, else resident in this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def out_of_memory_reported(why: str, remedy: str) -> Iterator[None]:
    """Raise `TryAgainError` with this reason and remedy for any error inside that means lack of memory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # saving the run needs the memory that the frames hold
        raise TryAgainError("out of memory", why, remedy) from error
