"""Settings of an export."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sinder_cli.errors import UsageError

TargetName = Literal["native", "transformers", "timm", "dinov2", "torchhub", "onnx", "adapter", "delta"]
DtypeName = Literal["float32", "float16", "bfloat16"]

SHARD_BYTES = 5 * 10**9  # the largest file that suits a hub
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export; `to` names the target.

    None stands for the default: the stored dtypes, the model's own image size, shards of `SHARD_BYTES`.
    """

    to: TargetName
    dtype: DtypeName | None = None
    image_size: int | None = None  # pixels
    dynamic_size: bool = False
    max_shard_size: int | None = None  # bytes
    verify: bool = True
    force: bool = False

    @property
    def given(self) -> dict[str, bool]:
        """Options that only some targets have: True for each one that was given."""
        return {
            "--dtype": self.dtype is not None,
            "--image-size": self.image_size is not None,
            "--dynamic-size": self.dynamic_size,
            "--max-shard-size": self.max_shard_size is not None,
        }


def parse_size(text: str) -> int:
    """Return the bytes of `500MB`, `2 GiB` or a plain number. Raises `UsageError` for any other text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", text.upper())
    size = round(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise UsageError(f"bad size {text!r}", "it is not a number of bytes", "use for example 5GB or 500MiB")
    return size
