"""Script that computes features with `torch.hub` from an exported folder: python SCRIPT FOLDER PIXELS FEATURES."""

from __future__ import annotations

import json
import sys
from pathlib import Path


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
        found = {f"{number}.tokens": model(images).contiguous() for number, images in load_file(pixels).items()}
    save_file(found, features)
    print(json.dumps({"torch.hub": torch.__version__}))


class _Refusing:
    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, *_: object) -> None:
        """Refuse the packages and their modules; leave all others to the next finders."""
        if name.partition(".")[0] in self.packages:
            raise ImportError(f"{name} is not part of the export")


if __name__ == "__main__":
    main(*sys.argv[1:])
