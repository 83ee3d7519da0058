"""Device, float32 precision and attention kernel of a backbone; all kernels compute softmax(QKᵀ/√d) V."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from sinder_cli.distributed import ALONE, Ranks
from sinder_cli.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]


DEVICE_NAMES = "auto, cpu, cuda, cuda:N or mps"


def is_device_name(name: str) -> bool:
    """Return True for a name that can stand for a device; whether this machine has it is another question."""
    return re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", name) is not None


def resolve_device(name: str, ranks: Ranks = ALONE) -> str:
    """Return the device that a name stands for: `auto` is the first CUDA device if there is one, else the CPU.

    Each of several processes gets a CUDA device of its own. A CUDA device becomes this process's current device. Raises
    `UsageError` for a name that stands for none, and `UnavailableError` for a device that does not exist.
    """
    if not is_device_name(name):
        raise UsageError(f"no device {name!r}", f"it must be {DEVICE_NAMES}", "leave it out, or name one of these")
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks.size > 1:
        name = f"cuda:{ranks.local_rank}"
    kind, _, number = name.partition(":")
    missing = kind == "cuda" and torch.cuda.device_count() <= int(number or 0)
    if missing or (kind == "mps" and not torch.backends.mps.is_available()):
        raise UnavailableError(f"cannot use device {name!r}", "PyTorch does not see it", "use --device cpu")
    if kind == "cuda":  # pinned memory and the like, which name no device, then belong to this one
        torch.cuda.set_device(int(number or 0))
    return name


def exact_device(device: str) -> str:
    """Return the device for computations in float64: the device itself, or the CPU for MPS, which has no float64."""
    return "cpu" if device == "mps" else device


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Set the precision of float32 products and convolutions on CUDA devices: TF32 if `tf32`, else full float32.

    Products are those of matrices. The previous settings are restored at the end. PyTorch's own default is TF32 for
    convolutions only.
    """
    from torch.backends import cuda, cudnn

    switches = (cuda.matmul, cudnn.conv)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


AttentionName = Literal["auto", "sdpa", "xformers", "eager"]


def attention_kernel(name: AttentionName = "auto") -> AttentionKernel:
    """Return a function of q, k, v, each `[batch, heads, tokens, head width]`, that returns the same shape.

    `auto` is PyTorch's fused kernel. Raises `UnavailableError` if xformers is requested and cannot run here.
    """
    if name == "xformers":
        return _xformers_kernel()
    if name == "eager":
        return _eager
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention


def require_attention(name: AttentionName, device: str) -> None:
    """Refuse a kernel that does not run on a resolved device. Raises `UnavailableError`."""
    attention_kernel(name)
    if name == "xformers" and not device.startswith("cuda"):
        raise _no_xformers(f"its kernels do not run on device {device!r}")


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(dim=-1) @ v


def _xformers_kernel() -> AttentionKernel:
    log = logging.getLogger("xformers")
    level = log.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            log.setLevel(logging.ERROR)  # what does not load is found by trying it
            from xformers.ops import memory_efficient_attention
    except Exception as error:  # a wheel built for another torch fails in many ways
        raise _no_xformers(f"{type(error).__name__}: {error}") from error
    finally:
        log.setLevel(level)
    import torch

    if not torch.cuda.is_available():
        raise _no_xformers("its kernels need a CUDA device")
    _require_running(memory_efficient_attention)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # xformers wants [batch, tokens, heads, head width]
        mixed: Tensor = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return mixed.transpose(1, 2)

    return kernel


def _require_running(attention: AttentionKernel) -> None:
    """Try the kernel once: xformers can be imported without its CUDA code, and says so only when it is called."""
    import torch

    probe = torch.zeros(1, 1, 1, 64, dtype=torch.float16, device="cuda")
    try:
        attention(probe, probe, probe)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise _no_xformers(f"it does not run with torch {torch.__version__} on this device: {first}") from error


def _no_xformers(why: str) -> UnavailableError:
    return UnavailableError("cannot use xformers attention", why, "use --attention sdpa")
