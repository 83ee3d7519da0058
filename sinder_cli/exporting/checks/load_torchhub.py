"""Script that computes features with `torch.hub` from an exported folder: python SCRIPT FOLDER PIXELS FEATURES."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: str, pixels: str, features: str) -> None:
    """Run the images through the model that torch.hub loads; importing anything of sinder fails meanwhile."""
    sys.dont_write_bytecode = True  # leave no bytecode in the folder
    import torch
    from safetensors.torch import load_file, save_file

    own = {"sinder_cli", "sinder_plugins"}
    sys.meta_path.insert(0, _Refusing(own))
    (name,) = (path.stem for path in Path(folder).glob("*.pth"))
    model = torch.hub.load(folder, name, source="local").float()
    with torch.inference_mode():
        found = {f"{number}.tokens": tokens(model, images) for number, images in load_file(pixels).items()}
    save_file(found, features)
    print(json.dumps({"torch.hub": torch.__version__}))


def tokens(model: Any, images: Any) -> Any:
    """Return all tokens after the final norm: what the model returns, or by kind if it is called as DINOv2 is."""
    import torch

    if not hasattr(model, "forward_features"):
        return model(images).contiguous()
    found = model.forward_features(images)
    kinds = [found[f"x_norm_{kind}tokens"] for kind in ("reg", "patch")]
    return torch.cat([found["x_norm_clstoken"][:, None], *kinds], dim=1)


class _Refusing:
    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, *_: object) -> None:
        """Refuse the packages and their modules; leave all others to the next finders."""
        if name.partition(".")[0] in self.packages:
            raise ImportError(f"{name} is not part of the export")


if __name__ == "__main__":
    main(*sys.argv[1:])
